"""Validation while training: it changes nothing, finds the best step, ends a run early, and survives being killed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from planlm.config import PlannerConfig, TrainConfig
from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError, MachineError
from planlm.evaluation.perplexity import score_documents
from planlm.model.loading import load_model
from planlm.training import loop
from planlm.training.objective import Objective
from planlm.training.pretrain_planner import pretrain_planner
from planlm.training.train import train
from planlm.training.validation import Validation

TIMES = dict.fromkeys(
    ("tokens_per_second", "waiting", "memory", "seconds", "seconds_left", "utilisation", "run", "model")
)
"""What depends on the clock, and on where the run is."""


def settings(planted: dict[str, str], out: Path, **changes: Any) -> TrainConfig:
    values = {
        "corpus": planted["corpus"], "lm": planted["lm"], "out": str(out), "steps": 12, "batch_size": 4, "window": 16,
        "conditioned_layers": 2, "precision": "fp32", "log_every": 1, "checkpoint_every": 5, "keep_checkpoints": 1,
        "lm_mode": "full", "unfreeze_planner_at": 0.2,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


@pytest.fixture(autouse=True)
def _no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes longer than these runs."""
    monkeypatch.setattr("planlm.training.train.matrix_product_rate", lambda *_: 1e9)


@pytest.fixture
def _best_at_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are multiplied, but those after step 4."""
    after = Validation.after

    def worse(self: Validation, step: int, steps: int) -> dict[str, float]:
        measure, factor = self.measure, 1 + abs(step - 4)
        self.measure = lambda: factor * measure()
        try:
            return after(self, step, steps)
        finally:
            self.measure = measure

    monkeypatch.setattr(Validation, "after", worse)


def lines(out: Path) -> list[dict[str, Any]]:
    """What is logged and does not depend on the clock."""
    found = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


def validated(out: Path) -> dict[int, float]:
    return {line["step"]: line["validation_loss"] for line in lines(out) if "validation_loss" in line}


@pytest.mark.parametrize("lm_mode", ["freeze", "full"])
def test_training_is_what_it_is_without(lm_mode: str, planted: dict[str, str], tmp_path: Path) -> None:
    """With everything that has a random state or a mode: noise, sampled oracles, dropout in planner and LM."""
    changes = {"lm_mode": lm_mode, "selection": "gumbel", "oracle_mix": "0.5", "lm_dropout": 0.1}
    train(settings(planted, tmp_path / "without", **changes))
    train(settings(planted, tmp_path / "with", **changes, validate_every=1))
    plain = [{key: line[key] for key in line if key != "validation_loss"} for line in lines(tmp_path / "with")]
    assert plain == lines(tmp_path / "without") and len(validated(tmp_path / "with")) == 12
    states = [load_file(tmp_path / name / "checkpoints/step-12/tensors.safetensors") for name in ("with", "without")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.mark.usefixtures("_best_at_4")
def test_best_step_is_kept_and_becomes_the_model(planted: dict[str, str], tmp_path: Path) -> None:
    config = settings(planted, tmp_path / "run", validate_every=2, validate_documents=5, steps=11)
    result = train(config)
    found = validated(tmp_path / "run")
    assert list(found) == [2, 4, 6, 8, 10, 11]
    assert (result["best_step"], result["best_loss"], result["step"]) == (4, found[4], 11)
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"step-4", "step-11"}
    kept = load_file(tmp_path / "run/checkpoints/step-4/tensors.safetensors")
    model = load_file(tmp_path / "run/model/model.safetensors")
    assert all(torch.equal(model[name[6:]], kept[name]) for name in kept if name.startswith("model/"))
    held_out = PreparedCorpus.load(planted["corpus"]).split("validation").select(range(5))
    scores = score_documents(load_model(str(tmp_path / "run")), held_out, selections=["soft"], window=16)["soft"]
    assert found[4] == pytest.approx(scores.nll, rel=1e-5)
    card = (tmp_path / "run/model/README.md").read_text()
    assert "| steps | 4 |" in card and f"| validation loss (nats) | {found[4]:.4g} |" in card, "what is the model"
    assert f"| corpus (fingerprint) | {PreparedCorpus.load(planted['corpus']).fingerprint} |" in card
    assert planted["lm"] not in card and str(tmp_path) not in card
    (tmp_path / "run/checkpoints/step-4/tensors.safetensors").write_bytes(b"torn")
    with pytest.raises(MachineError, match=r"step-4: the best checkpoint is damaged or gone"):
        train(replace(config, resume=True))


@pytest.mark.usefixtures("_best_at_4")
def test_patience_ends_the_run_and_leaves_the_rates_alone(
    planted: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"validate_every": 2, "log_every": 3}
    whole = train(settings(planted, tmp_path / "whole", **changes))
    cut = train(settings(planted, tmp_path / "cut", **changes, patience=2))
    assert (cut["best_step"], cut["step"], whole["step"]) == (4, 8, 12)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")[: len(lines(tmp_path / "cut"))]
    again = train(settings(planted, tmp_path / "cut", **changes, patience=2, resume=True))
    assert again == cut, "a resumed run is at its end"
    assert "over since step 8, by --patience; set more to go on" in capsys.readouterr().err
    longer = train(settings(planted, tmp_path / "cut", **changes, patience=9, resume=True))
    assert longer["step"] == 12 and lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.usefixtures("_best_at_4")
def test_killed_anywhere_it_ends_as_if_it_never_had_been(
    planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first checkpoint, while it measures, before the best step is saved, after that."""
    changes = {"validate_every": 2, "patience": 2, "checkpoint_every": 3}
    expected = train(settings(planted, tmp_path / "whole", **changes))
    moments: list[tuple[Any, str, int]] = [
        (Objective, "losses", 5), (loop, "save_checkpoint", 2), (Objective, "losses", 3), (loop, "save_checkpoint", 1),
        (Objective, "backward", 2), (loop, "save_checkpoint", 1),
    ]  # fmt: skip
    for number, (place, name, at) in enumerate(moments):
        calls, original = iter(range(1, at)), getattr(place, name)

        def dying(*arguments: Any, calls: Any = calls, original: Any = original) -> Any:
            if next(calls, None) is None:
                raise RuntimeError("killed")
            return original(*arguments)

        monkeypatch.setattr(place, name, dying)
        with pytest.raises(RuntimeError, match="killed"):
            train(settings(planted, tmp_path / "cut", **changes, resume=number > 0))
        monkeypatch.setattr(place, name, original)
    result = train(settings(planted, tmp_path / "cut", **changes, resume=True))
    assert {**result, **TIMES} == {**expected, **TIMES} and result["step"] == 8
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    models = [load_file(tmp_path / run / "model/model.safetensors") for run in ("cut", "whole")]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[1])


def test_planner_of_the_best_step(planted: dict[str, str], tmp_path: Path) -> None:
    values = {"steps": 30, "batch_size": 16, "heads": 4, "lr": 0.5, "schedule": "constant", "validate_every": 5}
    config = PlannerConfig(corpus=planted["corpus"], out=str(tmp_path / "run"), **values, log_every=7)
    result = pretrain_planner(config)
    found = validated(tmp_path / "run")
    best = min(found, key=lambda step: found[step])
    assert list(found) == [5, 10, 15, 20, 25, 30] and result["best_step"] == best < 30
    assert result["nll"] == pytest.approx(found[best], rel=1e-5)
    assert result["best_loss"] == found[best]


def test_mistakes_are_named(planted: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--patience: counts measurements .* set --validate-every too"):
        train(settings(planted, tmp_path / "run", patience=3))
    assert not (tmp_path / "run").exists()


def test_documents_without_a_token_to_predict_are_refused(
    planted: dict[str, str], of_one_token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of 0 over no token would be the best for ever."""
    documents = PreparedCorpus.load(of_one_token).split("validation")
    monkeypatch.setattr("planlm.training.train.first_documents", lambda *_: documents)
    with pytest.raises(InputError, match=r"^--validate-documents: none of those documents has a second token"):
        train(settings(planted, tmp_path / "run", validate_every=1))
    assert not (tmp_path / "run").exists()
