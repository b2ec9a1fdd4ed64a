"""Parameter groups: what trains, from which step on, how fast; and the optimiser over them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from planlm.config import TrainConfig
from planlm.model.lora import lora_parameters
from planlm.model.modeling import PlanLMForCausalLM
from planlm.selections import SELECTIONS

BIAS_REACH = 0.5
"""Times the square root of A: learning rate of the adapter's bias, in those of its weight.

Adam moves a weight by up to a learning rate a step, and so `W m` by up to `lr * |m|_1`, which for centroids of unit
vectors (norm about .6) is about `0.5 sqrt(A)` learning rates. At one learning rate the bias cannot keep up, and a plan
that never changes learns what all text has in common faster than one that does: with few steps `fixed` then beats
even `oracle` (dev/log.md).
"""

EMBEDDED = 0.1
"""Learning rate of what is added to token embeddings, in those of an adapter.

Token embeddings are small beside what attention returns. On a GPT-2 of 4.5 million parameters, frozen, 40,000 tokens,
a rate of 1e-2 serves the adapter (loss 5.356); here it takes the loss from 5.37 to 7.54 within 10 steps, 1e-3 ends at
5.362, 1e-4 at 5.356.
"""


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


def trainable_groups(model: PlanLMForCausalLM, config: TrainConfig, steps: int) -> list[ParameterGroup]:
    """Switch gradients off everywhere, then name what trains, from which step on and how fast.

    The planner trains where the LM's loss reaches it or `--planner-loss` asks for it; the codebook in every
    selection that shows it to the LM.
    """
    model.requires_grad_(False)
    groups = []

    def add(name: str, parameters: dict[str, nn.Parameter], lr: float, at: float = 0.0) -> None:
        if at < 1.0:
            groups.append(ParameterGroup(name, parameters, lr, start=round(at * steps)))

    if config.selection != "none":
        adapter = dict(model.adapter.named_parameters(prefix="adapter"))
        # The control's last biases learn as fast as the adapter's, or it would be the weaker for that.
        last = [name for name in adapter if name == "adapter.bias" or (".up." in name and name.endswith(".bias"))]
        bias = {name: adapter.pop(name) for name in last}
        codebook = {name: adapter.pop(name) for name in ("adapter.codebook",) if name in adapter}
        lr = config.lr * (EMBEDDED if config.conditioning == "embedding" else 1.0)
        add("adapter", adapter, lr)
        add("bias", bias, lr * BIAS_REACH * model.config.action_dim**0.5)
        if codebook:
            add("codebook", codebook, config.codebook_lr, config.unfreeze_codebook_at)
    learns = SELECTIONS[config.selection].trains_planner or config.planner_loss > 0
    if learns and not config.freeze_planner and model.planner is not None:
        planner = dict(model.planner.named_parameters(prefix="planner"))
        if config.planner_loss == 0:  # nothing but the planner's own loss reaches the heads that look further ahead
            planner = {name: value for name, value in planner.items() if not name.startswith("planner.ahead.")}
        if model.planner_input is not None:
            planner |= dict(model.planner_input.named_parameters(prefix="planner_input"))
        add("planner", planner, config.planner_lr, config.unfreeze_planner_at)
    # LoRA's best learning rate is about ten times that of all weights (Schulman et al., LoRA Without Regret, 2025).
    if config.lm_mode == "full":
        add("lm", dict(model.lm.named_parameters(prefix="lm")), 5e-5 if config.lm_lr is None else config.lm_lr)
    elif config.lm_mode == "lora":
        add("lm", lora_parameters(model.lm, prefix="lm"), 5e-4 if config.lm_lr is None else config.lm_lr)
    return groups


def by_name(groups: list[ParameterGroup]) -> dict[str, nn.Parameter]:
    """All that trains, by its name in the model."""
    return {name: parameter for group in groups for name, parameter in group.parameters.items()}


@torch.no_grad()
def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether there is no NaN and no infinity in tensors, or in this rank's shards."""
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


def blank_state(groups: list[ParameterGroup], optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Give the optimiser zeros under the names that `optimizer_tensors` gave: what a checkpoint is read into.

    The number of steps too lies beside its parameter: the fused update reads it there, without asking the host.
    """
    parameters = by_name(groups)
    for path in names:
        name, _, key = path.rpartition("/")
        parameter = parameters[name]
        is_count = key == "step"  # one number, the same on every rank
        zeros = torch.zeros((), device=parameter.device) if is_count else torch.zeros_like(parameter).detach()
        optimizer.state[parameter][key] = zeros
