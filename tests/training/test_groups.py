"""Optimiser state that goes to a checkpoint and comes back where the fused update wants it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from planlm.training.groups import (
    ParameterGroup,
    blank_state,
    make_optimizer,
    optimizer_tensors,
)


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
