"""A run that somebody else packed: nothing outside of it is written, whatever links lie in it."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from planlm.config import PlannerConfig, TrainConfig
from planlm.errors import InputError
from planlm.training.pretrain_planner import pretrain_planner
from planlm.training.train import train

FILES = (
    "config.yaml", "metrics.jsonl", "identity.json", "lock", "config.yaml.partial", ".planlm-0123456789ab.partial",
    "model/model.safetensors", "model.partial", "planner_metrics.json", "evaluation.json", "generation.json",
    "checkpoints/step-3/state.json", "checkpoints/step-3.partial", "checkpoints/step-3.damaged",
    "tensorboard/events.out.tfevents.1",
)  # fmt: skip
FOLDERS = ("checkpoints", "checkpoints/step-2", "checkpoints/step-4", "model", "planner", "tensorboard")


def joint(planted: dict[str, str], out: Path, steps: int = 4, resume: bool = True) -> TrainConfig:
    return TrainConfig(
        **planted, out=str(out), steps=steps, batch_size=2, window=16, conditioned_layers=1, checkpoint_every=2,
        precision="fp32", resume=resume,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(planted: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, made under a umask that lets colleagues read."""
    out = tmp_path_factory.mktemp("finished") / "run"
    before = os.umask(0o022)
    try:
        train(joint(planted, out, resume=False))
    finally:
        os.umask(before)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, reached through a link as users may; `outside` beside it must stay as it is."""
    shutil.copytree(finished, tmp_path / "copy")
    (tmp_path / "run").symlink_to("copy")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("precious")
    return tmp_path / "run"


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
@pytest.mark.parametrize("target", ["file", "absent", "."])
def test_a_link_out_of_the_run_is_refused(planted: dict[str, str], run: Path, name: str, target: str) -> None:
    outside, link = run.parent / "outside", run / name
    link.parent.mkdir(exist_ok=True)
    shutil.rmtree(link) if link.is_dir() else link.unlink(missing_ok=True)
    link.symlink_to(outside / target)
    for config, command in (
        (joint(planted, run), train),
        (PlannerConfig(corpus=planted["corpus"], out=str(run), steps=1, batch_size=4, heads=1, resume=True),
         pretrain_planner),
    ):  # fmt: skip
        with pytest.raises(InputError, match="a link out of") as caught:
            command(config)  # type: ignore[arg-type]
        assert str(link) in str(caught.value)
    assert [path.name for path in outside.iterdir()] == ["file"] and (outside / "file").read_text() == "precious"


def test_a_pipe_in_the_run_is_refused_and_not_waited_for(planted: dict[str, str], run: Path) -> None:
    (run / "config.yaml").unlink()
    os.mkfifo(run / "config.yaml")
    with pytest.raises(InputError, match=r"config\.yaml: neither a file nor a folder"):
        train(joint(planted, run))


def test_out_itself_may_be_a_link(planted: dict[str, str], run: Path) -> None:
    (run / "checkpoints" / ".planlm-0123456789ab.partial").mkdir()  # left by a kill that no handler sees
    shutil.rmtree(run / "checkpoints" / "step-4")
    shutil.rmtree(run / "model")
    train(joint(planted, run))
    assert run.is_symlink() and (run / "model" / "config.json").is_file()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-2", "step-4"]


def test_modes_follow_the_umask(finished: Path) -> None:
    for path in (finished, *finished.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path
