"""Optimiser state that goes to a checkpoint and comes back where the fused update wants it; every conditioning's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from planlm.config import EvaluateConfig, TrainConfig
from planlm.errors import InputError
from planlm.evaluation.evaluate import evaluate
from planlm.training.groups import (
    ParameterGroup,
    blank_state,
    make_optimizer,
    optimizer_tensors,
)
from planlm.training.objective import Objective
from planlm.training.train import train


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def groups_of(*parameters: nn.Parameter) -> list[ParameterGroup]:
    return [ParameterGroup("all", {f"weight{number}": each for number, each in enumerate(parameters)}, lr=0.1)]


def stepped(groups: list[ParameterGroup]) -> torch.optim.AdamW:
    optimizer = make_optimizer(groups, 0.0)
    for parameter in groups[0].parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_restored_state_lies_beside_its_parameter() -> None:
    """On a device without data, as on CUDA: the fused update refuses a `step` that is elsewhere."""
    names = list(optimizer_tensors(here := groups_of(nn.Parameter(torch.ones(3, 2))), stepped(here)))
    away = groups_of(nn.Parameter(torch.ones(3, 2, device="meta")))
    (parameter,) = away[0].parameters.values()
    optimizer = torch.optim.AdamW([parameter])
    blank_state(away, optimizer, names)
    assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
    for name, value in optimizer.state[parameter].items():
        assert value.device == parameter.device, name
        assert value.shape == (() if name == "step" else parameter.shape)
        assert value.dtype == torch.float32 and not value.requires_grad


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("is_divided", [False, True], ids=["plain", "divided"])
def test_what_is_restored_is_what_the_optimiser_makes_itself(is_divided: bool) -> None:
    """Same kinds of tensors, on the same devices, and the next step is taken from them."""
    weight = torch.arange(6.0).reshape(3, 2)
    if is_divided:
        weight = distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)])
    groups = groups_of(nn.Parameter(weight))
    (parameter,) = groups[0].parameters.values()
    optimizer = stepped(groups)
    saved = {name: value.clone() for name, value in optimizer_tensors(groups, optimizer).items()}
    again = make_optimizer(groups, 0.0)
    blank_state(groups, again, list(saved))
    for name, value in optimizer_tensors(groups, again).items():
        value.copy_(saved[name])
    for key, value in optimizer.state[parameter].items():
        restored = again.state[parameter][key]
        assert isinstance(restored, DTensor) is isinstance(value, DTensor), key
        assert (restored.device, restored.shape, restored.dtype) == (value.device, value.shape, value.dtype), key
    again.step()
    assert float(again.state[parameter]["step"]) == 2


@pytest.mark.parametrize(
    ("way", "trained"),
    [
        ({"codebook_per_layer": True, "gate": True}, {"weight", "gate", "bias", "codebook"}),
        ({"conditioning": "embedding", "gate": True}, {"weight", "gate", "bias", "codebook"}),
        ({"conditioning": "insert"}, {"weight", "bias", "codebook"}),
        (
            {"conditioning": "bottleneck", "selection": "fixed"},
            {"down.0.weight", "down.0.bias", "up.0.weight", "up.0.bias"},
        ),
    ],
)
def test_every_conditioning_trains_and_is_evaluated(
    way: dict[str, Any], trained: set[str], planted: dict[str, str], tmp_path: Path
) -> None:
    """A run that is taken up in the middle ends where one does that was not; every weight has moved."""
    options = {"steps": 4, "window": 32, "batch_size": 4, "lr": 1e-2, "conditioning": "adapter", **way}
    shared = {
        "corpus": planted["corpus"],
        "lm": planted["lm"],
        "unfreeze_planner_at": 0.0,
        "checkpoint_every": 2,
        "log_every": 1,
    }
    runs = {name: TrainConfig(out=str(tmp_path / name), **shared, **options) for name in ("whole", "cut")}
    last = train(runs["whole"])
    with pytest.MonkeyPatch.context() as patch:
        seen, plain = [], Objective.backward
        patch.setattr(Objective, "backward", lambda *a: seen.append(1) or (plain(*a) if len(seen) < 4 else 1 / 0))
        with pytest.raises(ZeroDivisionError):
            train(runs["cut"])
    assert train(dataclasses.replace(runs["cut"], resume=True))["loss"] == last["loss"]
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in runs)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    stored = load_file(tmp_path / "whole" / "checkpoints" / "step-4" / "tensors.safetensors")
    moments = {name: value for name, value in stored.items() if name.endswith("exp_avg")}
    names = {name.removeprefix("optimizer/adapter.").removesuffix("/exp_avg") for name in moments if "adapter" in name}
    assert trained <= names and all(value.abs().sum() > 0 for value in moments.values())
    rate = max(json.loads(line)["lr"]["adapter"] for line in (tmp_path / "whole" / "metrics.jsonl").open())
    assert rate == pytest.approx(1e-3 if way.get("conditioning") == "embedding" else 1e-2)
    has_planner = "selection" not in way
    assert has_planner == any("planner" in name for name in moments) == any("planner" in name for name in whole)
    plans = "none,fixed,soft,oracle" if has_planner else "none,fixed"
    result = evaluate(EvaluateConfig(run=str(tmp_path / "whole"), corpus=planted["corpus"], plans=plans, bootstrap=10))
    assert len({round(row["nll"], 6) for row in result["rows"]}) == len(result["rows"])
    assert (result["planner"] is None) != has_planner
    if not has_planner:
        with pytest.raises(InputError, match="set --plans none,fixed"):
            evaluate(EvaluateConfig(run=str(tmp_path / "whole"), corpus=planted["corpus"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning": "insert", "gate": True}, "--gate: has no meaning with conditioning insert"),
        ({"conditioning": "insert", "conditioned_layers": 1}, "--conditioned-layers: has no meaning with"),
        ({"conditioning": "insert", "codebook_per_layer": True}, "--codebook-per-layer: has no meaning"),
        (
            {"conditioning": "insert", "attention_window": 1},
            "--attention-window 1: with --conditioning insert no token",
        ),
        ({"conditioning": "bottleneck"}, "--selection soft: conditioning bottleneck has no plan; set selection fixed"),
        (
            {"conditioning": "bottleneck", "selection": "fixed", "planner_loss": 0.1},
            "--conditioning bottleneck has no plan; leave --planner-loss and --oracle-mix out",
        ),
    ],
)
def test_contradictions_are_found_before_anything_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(TrainConfig(corpus="nowhere", out="nowhere", **options))
