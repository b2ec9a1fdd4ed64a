"""Training that goes on from the joint model of an earlier run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from planlm.config import PlannerConfig, TrainConfig
from planlm.errors import InputError
from planlm.files import read_json, write_json
from planlm.model.loading import load_model
from planlm.training.pretrain_planner import pretrain_planner
from planlm.training.train import train

from . import small

STILL = {"lr": 0.0, "planner_lr": 0.0, "codebook_lr": 0.0, "lm_lr": 0.0, "steps": 1}

WAYS: dict[str, dict[str, Any]] = {
    "adapter": {"lm_mode": "full", "gate": True, "codebook_per_layer": True},
    "insert": {"conditioning": "insert"},
    "bottleneck": {"conditioning": "bottleneck", "selection": "fixed"},
    "lm states": {"planner_input": "both", "conditioned_layers": 1, "lm_mode": "full"},
    "lora": {"lm_mode": "lora", "lm_lr": 1e-2, "attention_window": 9},
}


@pytest.fixture(autouse=True)
def _no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes longer than these runs."""
    monkeypatch.setattr("planlm.training.train.matrix_product_rate", lambda *_: 1e9)


def settings(planted: dict[str, str], out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {"steps": 4, "checkpoint_every": 2, "planner_lr": 1e-3, "unfreeze_planner_at": 0.0}
    return small.settings(planted, out, **usual | changes)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def earlier(planted: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all weights."""
    out = tmp_path_factory.mktemp("earlier") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planlm.training.train.matrix_product_rate", lambda *_: 1e9)
        train(settings(planted, out, lm_mode="full"))
    return out


@pytest.mark.parametrize("way", WAYS)
def test_all_of_the_joint_model_goes_on(way: str, planted: dict[str, str], tmp_path: Path) -> None:
    """With rates of zero a run leaves every weight as it found it; with others every part moves on from there."""
    build = WAYS[way]
    train(settings(planted, tmp_path / "first", **build))
    before = weights(tmp_path / "first")
    train(settings(planted, tmp_path / "still", lm=str(tmp_path / "first"), **build | STILL))
    still = weights(tmp_path / "still")
    assert still.keys() == before.keys() and all(torch.equal(still[name], before[name]) for name in before)
    train(settings(planted, tmp_path / "on", lm=str(tmp_path / "first" / "model"), **build))
    after = weights(tmp_path / "on")
    assert after.keys() == before.keys(), "LoRA is merged again"
    moved = {name.split(".")[0] for name in before if not torch.equal(after[name], before[name])}
    parts = {name.split(".")[0] for name in before} - ({"lm"} if "lm_mode" not in build else set())
    assert moved == parts - ({"planner"} if way == "bottleneck" else set())


def test_plans_are_made_as_the_new_run_says(planted: dict[str, str], earlier: Path, tmp_path: Path) -> None:
    how = {"selection": "top-k", "top_k": 2, "temperature": 1.5, "lm": str(earlier)}
    train(settings(planted, tmp_path / "run", **how))
    config = load_model(str(tmp_path / "run")).config
    assert (config.selection, config.plan_top_k, config.plan_temperature) == ("top-k", 2, 1.5)


def test_a_planner_given_beside_takes_the_place_of_the_models(
    planted: dict[str, str], earlier: Path, tmp_path: Path
) -> None:
    options = {"layers": 1, "heads": 4, "horizon": 2, "steps": 2}
    pretrain_planner(PlannerConfig(corpus=planted["corpus"], out=str(tmp_path / "planner"), **options))
    train(settings(planted, tmp_path / "run", lm=str(earlier), planner=str(tmp_path / "planner"), **STILL))
    model = load_model(str(tmp_path / "run"))
    own = load_file(tmp_path / "planner" / "planner" / "planner.safetensors")
    assert (model.config.planner_layers, model.config.planner_horizon) == (1, 2)
    assert own.keys() == model.planner.state_dict().keys()
    assert all(torch.equal(value, own[name]) for name, value in model.planner.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"conditioning": "insert"},
            r"--lm .*run: the joint model was built with --conditioning adapter, and stays so",
        ),
        ({"gate": True, "attention_window": 5}, r"built with no --gate, no --attention-window, and stays so; set the"),
        ({"conditioned_layers": 2}, r"built with --conditioned-layers 1, and"),
        ({"window": 65}, r"--window 65: the context of .*run is 64 tokens"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    changes: dict[str, Any], message: str, planted: dict[str, str], earlier: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("planlm.training.start.load_model", lambda _: pytest.fail("loaded"))
    with pytest.raises(InputError, match=message) as raised:
        train(settings(planted, tmp_path / "out", lm=str(earlier), **changes))
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_actions": 5, "action_labels": None}, r"--lm .*copy: has 5 actions, .*corpus 4; give the corpus that"),
        ({"encoder": "other"}, r"--lm .*copy: its sentence encoder is other, .*corpus has another, types"),
        ({"codebook_fingerprint": "0"}, r"--lm .*copy: trained on other actions than those of .*corpus; give the"),
    ],
)
def test_a_model_of_other_actions_is_refused(
    changes: dict[str, Any], message: str, planted: dict[str, str], earlier: Path, tmp_path: Path
) -> None:
    shutil.copytree(earlier, tmp_path / "copy")
    path = tmp_path / "copy" / "model" / "config.json"
    write_json(path, read_json(path) | changes)
    with pytest.raises(InputError, match=message):
        train(settings(planted, tmp_path / "out", lm=str(tmp_path / "copy")))


def test_an_unfinished_run_is_no_model_yet(planted: dict[str, str], earlier: Path, tmp_path: Path) -> None:
    shutil.copytree(earlier, tmp_path / "copy", ignore=shutil.ignore_patterns("model"))
    with pytest.raises(InputError, match=r"copy: no trained model here yet .*; finish the run first"):
        train(settings(planted, tmp_path / "out", lm=str(tmp_path / "copy")))


def test_it_resumes_with_the_same_model_only(planted: dict[str, str], earlier: Path, tmp_path: Path) -> None:
    """Whose every part counts, wherever it lies."""
    shutil.copytree(earlier, tmp_path / "moved")
    config = settings(planted, tmp_path / "run", lm=str(earlier))
    train(config)
    whole = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    train(replace(config, lm=str(tmp_path / "moved" / "model"), resume=True))
    again = weights(tmp_path / "run")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    model = load_model(str(tmp_path / "moved"))
    with torch.no_grad():
        model.adapter.bias[0] += 1
    shutil.rmtree(tmp_path / "moved" / "model")
    model.save_pretrained(tmp_path / "moved" / "model")
    with pytest.raises(InputError, match=r"cannot resume with other content .*\(lm .*moved, now another"):
        train(replace(config, lm=str(tmp_path / "moved"), resume=True))
