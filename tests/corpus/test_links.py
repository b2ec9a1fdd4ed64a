"""A corpus that somebody else packed: nothing outside of it is written, whatever links lie in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from planlm.config import PrepareConfig
from planlm.corpus.prepare import prepare
from planlm.errors import InputError

Settings = Callable[..., PrepareConfig]

FILES = (
    "corpus.json", "codebook.safetensors", "dataset_dict.json", "partial/arguments.json", "partial/lock",
    "partial/shard-00001.arrow", "partial/shard-00001.arrow.partial", "partial/.planlm-0123456789ab.partial",
    "train/data-00000.arrow", "train/state.json", "train/dataset_info.json",
)  # fmt: skip
FOLDERS = ("partial", "train", "validation", "test")


@pytest.fixture
def stopped(settings: Settings, sixty: str, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    """A preparation that was stopped after its first shard, to go on with."""
    config = settings(sixty, shard_documents=25)
    calls: list[Path] = []
    with monkeypatch.context() as patch:
        rename = Path.replace

        def stop(self: Path, target: Path) -> Path:
            calls.append(target)
            if len(calls) > 2:
                raise KeyboardInterrupt
            return rename(self, target)

        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert (Path(config.out) / "partial" / "shard-00000.arrow").exists()
    return config


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What must stay as it is."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("precious")
    return tmp_path / "outside"


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
@pytest.mark.parametrize("target", ["file", "absent", "."])
def test_a_link_out_of_the_corpus_is_refused(stopped: PrepareConfig, outside: Path, name: str, target: str) -> None:
    link = Path(stopped.out) / name
    link.parent.mkdir(exist_ok=True)
    if link.is_dir():
        link.rename(link.with_name("aside"))
    link.unlink(missing_ok=True)
    link.symlink_to(outside / target)
    with pytest.raises(InputError, match="a link out of") as caught:
        prepare(stopped)
    assert str(link) in str(caught.value)
    assert [path.name for path in outside.iterdir()] == ["file"] and (outside / "file").read_text() == "precious"
    link.unlink()
    if link.with_name("aside").exists():
        link.with_name("aside").rename(link)
    if name != "partial/arguments.json":  # without it, nobody knows what the shards are of
        prepare(stopped)


def test_a_pipe_in_the_corpus_is_refused_and_not_waited_for(stopped: PrepareConfig) -> None:
    (Path(stopped.out) / "partial" / "arguments.json").unlink()
    os.mkfifo(Path(stopped.out) / "partial" / "arguments.json")
    with pytest.raises(InputError, match=r"arguments\.json: neither a file nor a folder"):
        prepare(stopped)


def test_out_itself_may_be_a_link(settings: Settings, sixty: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "named").symlink_to("disk")
    prepare(settings(sixty, out=str(tmp_path / "named")))
    assert (tmp_path / "disk" / "corpus.json").exists() and (tmp_path / "named").is_symlink()


def test_modes_follow_the_umask(settings: Settings, sixty: str) -> None:
    before = os.umask(0o027)
    try:
        corpus = prepare(settings(sixty))
    finally:
        os.umask(before)
    for path in (corpus.path, *corpus.path.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path
