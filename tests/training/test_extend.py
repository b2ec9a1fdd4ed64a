"""A run that is resumed with more steps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from planlm.config import PlannerConfig, TrainConfig
from planlm.errors import InputError
from planlm.training.pretrain_planner import pretrain_planner
from planlm.training.schedules import learning_rate_factor
from planlm.training.train import train

from . import small

UNSCHEDULED = {"schedule": "constant", "warmup": 0.0}


@pytest.fixture(autouse=True)
def _no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes longer than these runs."""
    monkeypatch.setattr("planlm.training.train.matrix_product_rate", lambda *_: 1e9)


def settings(planted: dict[str, str], out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {"steps": 5, "checkpoint_every": 4, "planner_lr": 1e-3, "keep_checkpoints": 99}
    return small.settings(planted, out, **usual | changes)


def lines(out: Path, *keys: str) -> list[Any]:
    return [[line[key] for key in keys] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]


def checkpoint(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step}" / "tensors.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_what_does_not_depend_on_the_length_is_the_longer_run(
    planted: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit, with noise, sampled oracles and the optimiser's moments; killed on the way too."""
    same = {**UNSCHEDULED, "unfreeze_planner_at": 0.0, "selection": "gumbel", "oracle_mix": "0.5", "lm_mode": "full"}
    train(settings(planted, tmp_path / "whole", steps=11, **same))
    train(settings(planted, tmp_path / "run", steps=5, **same))
    longer = settings(planted, tmp_path / "run", steps=11, **same, resume=True)
    train(longer)
    assert "11 steps in all, 5 before: learning rates and fractions of training are of 11" in capsys.readouterr().err
    for _ in range(2):
        assert equal(checkpoint(tmp_path / "run", 11), checkpoint(tmp_path / "whole", 11))
        assert equal(*(load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole")))
        assert lines(tmp_path / "run", "step", "loss") == lines(tmp_path / "whole", "step", "loss")
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-11")
        train(longer)
    assert "in all" not in capsys.readouterr().err, "the second time it is a run like others"


def test_rates_are_those_of_the_new_length(planted: dict[str, str], tmp_path: Path) -> None:
    train(settings(planted, tmp_path / "run"))
    train(settings(planted, tmp_path / "run", steps=9, resume=True))
    factors = [learning_rate_factor(step, 5) for step in range(5)] + [
        learning_rate_factor(step, 9) for step in (5, 6, 7, 8)
    ]
    found = [rates["adapter"] for (rates,) in lines(tmp_path / "run", "lr")]
    assert found == pytest.approx([1e-3 * factor for factor in factors])


def test_what_has_joined_stays(planted: dict[str, str], tmp_path: Path) -> None:
    """Of 5 steps the planner joins before the third, of 20 before the ninth; a codebook that had not joined waits."""
    config = settings(planted, tmp_path / "run", unfreeze_planner_at=0.4, unfreeze_codebook_at=0.9, checkpoint_every=1)
    train(replace(config, steps=4))  # the codebook would have joined after it
    longer = replace(config, steps=20, resume=True)
    train(longer)

    def moved(name: str) -> list[int]:
        states = [checkpoint(tmp_path / "run", step)[f"model/{name}"] for step in range(4, 10)]
        return [at + 5 for at in range(5) if not torch.equal(states[at], states[at + 1])]

    assert moved("planner.head.weight") == [5, 6, 7, 8, 9] and moved("adapter.codebook") == []
    last = checkpoint(tmp_path / "run", 20)
    for step in range(6, 21):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step}", ignore_errors=True)
    train(longer)
    assert equal(checkpoint(tmp_path / "run", 20), last)


def test_fewer_steps_are_refused_and_nothing_is_changed(planted: dict[str, str], tmp_path: Path) -> None:
    config = settings(planted, tmp_path / "run")
    train(config)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(
        InputError, match=r"run: a run of 5 steps cannot be resumed as one of 4; set --steps to 5 or more"
    ):
        train(replace(config, steps=4, resume=True))
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_epochs_may_become_more_epochs_or_steps(planted: dict[str, str], tmp_path: Path) -> None:
    config = settings(planted, tmp_path / "run", steps=None, epochs=0.02)
    first = train(config)["step"]
    second = train(replace(config, epochs=0.04, resume=True))["step"]
    assert 0 < first < second
    with pytest.raises(InputError, match=rf"a run of {second} steps cannot be resumed as one of {first}"):
        train(replace(config, resume=True))
    assert train(replace(config, steps=second + 1, resume=True))["step"] == second + 1


def test_a_planner_s_run_too(planted: dict[str, str], tmp_path: Path) -> None:
    config = PlannerConfig(
        corpus=planted["corpus"], out=str(tmp_path / "run"), steps=3, batch_size=8, heads=4, **UNSCHEDULED
    )
    pretrain_planner(config)
    pretrain_planner(replace(config, steps=7, resume=True))
    pretrain_planner(replace(config, steps=7, out=str(tmp_path / "whole")))
    assert equal(checkpoint(tmp_path / "run", 7), checkpoint(tmp_path / "whole", 7))
    assert equal(*(load_file(tmp_path / name / "planner" / "planner.safetensors") for name in ("run", "whole")))
