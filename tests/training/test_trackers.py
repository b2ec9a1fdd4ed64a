"""What trackers are given: every logged figure once, under one run, by the first process alone."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planlm.cli import main
from planlm.config import TrainConfig
from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError
from planlm.training import trackers
from planlm.training.train import train

from . import small


def settings(planted: dict[str, str], out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {"steps": 6, "checkpoint_every": 3}
    return small.settings(planted, out, **usual | changes)


def twice(config: TrainConfig) -> list[dict[str, Any]]:
    """Train, then again from step 3 on; the log lines."""
    train(config)
    shutil.rmtree(Path(config.out) / "checkpoints" / "step-6")
    train(replace(config, resume=True))
    return [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_has_every_logged_figure_once(planted: dict[str, str], tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lines = twice(settings(planted, tmp_path / "run", tracker="tensorboard"))
    board = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    for tag in ("loss", "lr/adapter", "tokens_per_second"):
        assert [event.step for event in board.Scalars(tag)] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])


def records(path: Path) -> Iterator[Any]:
    """What a file of Weights & Biases holds: protocol buffers in the log format of LevelDB, behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def test_weights_and_biases_has_every_logged_figure_under_one_id(
    planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    config = settings(planted, tmp_path / "run", tracker="wandb", steps=3)
    train(config)
    train(replace(config, steps=6, resume=True))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    losses, exits = [], []
    for file in files:
        for record in records(file):
            if record.HasField("run"):
                assert record.run.run_id == (tmp_path / "run" / "wandb_id").read_text()
                assert (record.run.display_name, record.run.project) == ("run", "planlm")
                given = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert given["window"] == 16
            elif record.HasField("exit"):
                exits.append(record.exit.exit_code)
            elif record.HasField("history"):
                found = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                losses.append((record.history.step.num, json.loads(found["loss"]), json.loads(found["lr/adapter"])))
    expected = [(line["step"], line["loss"], line["lr"]["adapter"]) for line in lines]
    assert losses == expected and exits == [0, 0]


def test_a_repeated_step_is_not_sent(planted: dict[str, str]) -> None:
    """To a run that goes on at the server, which knows the steps it has."""

    class Resumed:
        step, sent = 5, []  # type: ignore[var-annotated]

        def log(self, figures: dict[str, float], step: int, commit: bool) -> None:
            self.sent.append((step, figures))
            self.step = step + commit

    tracker = object.__new__(trackers.WeightsAndBiases)
    tracker._run = Resumed()
    for step in (3, 4, 5, 6):
        tracker.log({"step": step, "loss": 1.0, "lr": {"lm": 2.0}})
    assert Resumed.sent == [(5, {"loss": 1.0, "lr/lm": 2.0}), (6, {"loss": 1.0, "lr/lm": 2.0})]
    for step in (6, 7):  # of which the server has the first
        tracker.text("samples/0", "text", step)
    assert (Resumed.sent[2:], tracker._run.step) == ([(7, {"samples/0": "text"})], 7), "with the figures of its step"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_said_before_anything_is_loaded(
    name: str, planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreparedCorpus, "load", lambda _: pytest.fail("loaded"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=rf"--tracker {name}: needs the package {name}: pip install planlm\[{name}\]"):
        train(settings(planted, tmp_path / "run", tracker=name))
    assert not (tmp_path / "run").exists()


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb makes one of its name wherever somebody uses it."""
    (tmp_path / "folder_of_runs").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="needs the package folder_of_runs"):
        trackers.check_tracker("folder_of_runs")


def test_the_option_that_there_was_says_what_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--corpus", "c", "--out", "o", "--tensorboard"]) == 2
    assert "unknown option --tensorboard; give --tracker tensorboard" in capsys.readouterr().err
    (tmp_path / "settings.yaml").write_text("tensorboard: true\n")
    assert main(["train", "--corpus", "c", "--out", "o", "--config", str(tmp_path / "settings.yaml")]) == 2
    assert "unknown setting 'tensorboard'; give tracker: tensorboard" in capsys.readouterr().err
