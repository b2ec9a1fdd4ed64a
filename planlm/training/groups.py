"""Parameter groups: what trains, from which step on, how fast."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a learning rate of their own.

    Attributes:
        name: shown in logs ("adapter", "planner", ...).
        parameters: by their name in the model.
        lr: peak learning rate.
        start: step (0-based) at which they join training; before, no gradient is computed for them.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    lr: float
    start: int = 0


def by_name(groups: list[ParameterGroup]) -> dict[str, nn.Parameter]:
    """All that trains, by its name in the model."""
    return {name: parameter for group in groups for name, parameter in group.parameters.items()}


@torch.no_grad()
def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether there is no NaN and no infinity in tensors, or in this process's part of divided ones."""
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return not own or bool(torch.stack([tensor.detach().isfinite().all() for tensor in own]).all())


def make_optimizer(groups: list[ParameterGroup], weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW over all groups; weight decay on matrices only."""
    settings = []
    for group in groups:
        for matrices in (True, False):
            chosen = [parameter for parameter in group.parameters.values() if (parameter.ndim >= 2) is matrices]
            if chosen:
                settings.append(
                    {"params": chosen, "group": group.name, "weight_decay": weight_decay if matrices else 0.0}
                )
    return torch.optim.AdamW(settings, lr=0.0, betas=(0.9, 0.999), fused=True)


def optimizer_tensors(groups: list[ParameterGroup], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimiser state by parameter name, `NAME/exp_avg` and so on."""
    return {
        f"{name}/{key}": value if value.ndim else value.reshape(1)
        for group in groups
        for name, parameter in group.parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def blank_state(groups: list[ParameterGroup], names: list[str]) -> dict[str, torch.Tensor]:
    """Room for what `optimizer_tensors` gave under these names, on the parameters' devices and divided as they are.

    The number of steps too lies beside its parameter: the fused update reads it there, without asking the host.
    """
    parameters, room = by_name(groups), {}
    for path in names:
        parameter = parameters[path.rsplit("/", 1)[0]]
        is_count = path.endswith("/step")  # one number, whole everywhere, where moments are divided
        room[path] = torch.zeros(1, device=parameter.device) if is_count else torch.zeros_like(parameter).detach()
    return room


def restore_optimizer(
    groups: list[ParameterGroup], optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = by_name(groups)
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        optimizer.state[parameters[name]][key] = value.reshape(()) if key == "step" else value
