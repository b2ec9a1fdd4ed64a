"""What a run would cost, without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from planlm import cli
from planlm.config import TrainConfig
from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError
from planlm.training.train import train


def settings(planted: dict[str, str], out: Path, **changes: Any) -> TrainConfig:
    values = {"batch_size": 4, "window": 16, "conditioned_layers": 1, "precision": "fp32", "log_every": 1} | changes
    return TrainConfig(corpus=planted["corpus"], lm=planted["lm"], out=str(out), **{"dry_run": True, **values})


def test_a_dry_run_says_what_the_run_then_is(planted: dict[str, str], tmp_path: Path) -> None:
    found = train(settings(planted, tmp_path / "run", epochs=2))
    assert not (tmp_path / "run").exists()
    run = train(settings(planted, tmp_path / "run", epochs=2, dry_run=False))
    assert found["steps"] == run["step"]
    assert found["tokens"] == pytest.approx(run["tokens"], rel=0.1)
    assert found["windows"] == [4, 16] and found["sentences"][2] == 32 and found["segments"] > 0
    corpus = PreparedCorpus.load(planted["corpus"])
    assert found["trained"]["codebook"] == corpus.codebook.numel()
    assert set(found["trained"]) == {"adapter", "bias", "codebook", "planner"} and found["not_trained"] > 1000
    assert found["seconds_per_step"] > 0 and found["seconds"] == found["seconds_per_step"] * found["steps"]
    assert found["memory"] is None or found["memory"] > 1e6


def test_the_table_is_printed(planted: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--corpus", planted["corpus"], "--lm", planted["lm"], "--out", str(tmp_path / "run"), "--window", "16"]
    assert cli.main(["train", *words, "--batch-size", "4", "--steps", "5000", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "4 × 16" in printed and "5,000" in printed and "weights trained: planner" in printed
    assert not list(tmp_path.iterdir())


def test_a_dry_run_finds_what_the_run_would(planted: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--window 500: the context"):
        train(settings(planted, tmp_path / "run", window=500))
