"""Checkpoints survive being torn, and old ones go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from planlm.training.checkpoint import newest_checkpoint, read_tensors, save_checkpoint, stored_shapes


def save(folder: Path, step: int, keep: int = 2) -> Path:
    save_checkpoint(folder, {"w": torch.full((3,), float(step))}, {"step": step, "loader": {"epoch": step}}, keep)
    return folder / f"step-{step}"


def test_newest_is_loaded_and_only_the_last_are_kept(tmp_path: Path) -> None:
    for step in (2, 9, 10):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-9"]
    found = newest_checkpoint(tmp_path, print)
    assert found is not None
    path, state = found
    tensors = {"w": torch.zeros(3)}
    assert stored_shapes(path) == {"w": torch.Size([3])}
    read_tensors(path, tensors)
    assert tensors["w"].tolist() == [10.0] * 3
    assert state == {"format_version": 2, "step": 10, "loader": {"epoch": 10}}


@pytest.mark.parametrize("damage", ["tensors.safetensors", "state.json", "checksums.json"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone", "other"])
def test_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path: Path, damage: str, how: str) -> None:
    save(tmp_path, 1)
    victim = save(tmp_path, 2) / damage
    content = bytearray(victim.read_bytes())
    if how == "gone":
        victim.unlink()
    elif how == "other":
        victim.write_text("[1]")
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content[: len(content) // 2] if how == "cut" else content)
    said: list[str] = []
    found = newest_checkpoint(tmp_path, said.append)
    assert found is not None and found[1]["step"] == 1
    assert len(said) == 1 and "step-2" in said[0] and "damaged" in said[0]
    assert (tmp_path / "step-2.damaged").is_dir()


@pytest.mark.parametrize("name", ["step-²", "step-٣", "step-012", "step-" + 30 * "9", "step-x"])
def test_what_no_checkpoint_is_called_is_passed_over(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1).rename(tmp_path / name)
    save(tmp_path, 2)
    found = newest_checkpoint(tmp_path, print)
    assert found is not None and found[1]["step"] == 2 and (tmp_path / name).is_dir()


def test_half_written_checkpoint_is_not_seen_and_goes_with_the_next(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".planlm-0123456789ab.partial").mkdir()
    (tmp_path / ".planlm-0123456789ab.partial" / "tensors.safetensors").write_bytes(b"half of it")
    found = newest_checkpoint(tmp_path, print)
    assert found is not None and found[1]["step"] == 1
    save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]
    assert newest_checkpoint(tmp_path / "empty", print) is None


def test_a_colleague_can_read_it(tmp_path: Path) -> None:
    """safetensors writes for its own user alone, whatever the umask."""
    before = os.umask(0o022)
    try:
        folder = save(tmp_path / "checkpoints", 1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert folder.stat().st_mode & 0o777 == 0o755


def test_what_fails_within_torch_is_an_exception(tmp_path: Path) -> None:
    """torch's own `CheckpointException` is none, and no handler of errors would see it."""
    path = save(tmp_path, 1)
    (path / "tensors.safetensors").write_bytes(b"torn")
    with pytest.raises(Exception) as raised:  # noqa: PT011  whatever torch's reader met
        read_tensors(path, {"w": torch.zeros(3)})
    assert "CheckpointException" not in type(raised.value).__name__
