"""The definition of every operation in plain PyTorch: the fallback anywhere and the oracle of every test.

Sizes: S sentences, K actions, A action-embedding size, D plan size (layers stacked), P planner state, T tokens.

The arguments have been checked. Half-precision inputs are computed in float32 and rounded once, at the end; float64
stays float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import ProjectionInputs

MIXED = ("soft", "gumbel", "top-k")
"""Selections whose plan is the mixture of actions; the others' is picked: see `PICKED`."""

STRAIGHT_THROUGH = ("straight-through", "gumbel-hard")
"""Selections whose plan is picked, with the mixture's gradient."""

NOISY = ("gumbel", "gumbel-hard")
"""Selections that take noise."""


class PlanProjection(NamedTuple):
    """What `plan_projection` returns.

    Attributes:
        projected (Tensor): the plan in the LM's space, `[S, D]`, in the promoted dtype of codebook and weight.
        log_normalizer (Tensor): logsumexp of the logits that the selection works on, `[S]`, float32 or float64.
        oracle_nll (Tensor): the planner's cross-entropy against the oracle actions, `[S]`, float32 or float64.
    """

    projected: Tensor
    log_normalizer: Tensor
    oracle_nll: Tensor


def plan_projection(inputs: ProjectionInputs, selection: str) -> PlanProjection:
    """`mixture(softmax(logits / temperature), codebook) @ weight.T + bias`; see `planlm.kernels.plan_projection`."""
    source, head, head_bias, codebook, weight, bias, noise, oracle, oracle_weight, temperature, top_k, _ = inputs
    assert codebook is not None and weight is not None and oracle_weight is not None
    working = working_dtype(*inputs)
    logits = source.to(working)
    if head is not None:
        logits = F.linear(logits, head.to(working), converted(head_bias, working))
    actions = codebook.to(working)
    scores = logits if noise is None else logits + noise.to(working)
    if selection == "top-k":
        assert top_k is not None
        scores = scores.masked_fill(_all_but_largest(scores, top_k), -torch.inf)
    # Less the largest score before anything else: logits of 1e4 are 1e-3 apart in float32, their differences exact.
    best_score, best = scores.detach().max(dim=1, keepdim=True)  # [S, 1]; among equals the first
    scaled = (scores - best_score) / temperature  # [S, K], at most 0
    mixture = _mixture(selection, scaled, best.squeeze(1), actions, oracle)  # [S, A]
    if oracle is not None:
        mixture = mix_oracle(mixture, actions, oracle, oracle_weight)
    projected = F.linear(mixture, weight.to(working), converted(bias, working))  # [S, D]
    return PlanProjection(
        projected.to(torch.promote_types(codebook.dtype, weight.dtype)),
        scaled.logsumexp(dim=1) + best_score.squeeze(1) / temperature,
        logits.new_zeros(logits.shape[0])
        if oracle is None
        else F.cross_entropy(logits, oracle.clamp(min=-1), ignore_index=-1, reduction="none"),
    )


def add_plan(x: Tensor, plan: Tensor, segment_ids: Tensor, gate: Tensor | None = None) -> Tensor:
    """`x[t] + gate * plan[segment_ids[t]]`, and `x[t]` where the id is -1; see `planlm.kernels.add_plan`."""
    working = working_dtype(x, plan, gate)
    plans = plan.to(working) if gate is None else plan.to(working) * gate.to(working)  # [S, D]
    # Id -1 picks an extra first row of negative zeros: `v + -0.0` is `v` bit for bit, while `-0.0 + 0.0` is not.
    plans = torch.cat([plans.new_full((1, plans.shape[1]), -0.0), plans])  # [1 + S, D]
    # F.embedding and not `plans[ids]`: its backward sums every segment in a fixed order, on CPU and on CUDA.
    return (x.to(working) + F.embedding(segment_ids + 1, plans)).to(x.dtype)


def working_dtype(*inputs: Tensor | float | None) -> torch.dtype:
    """The dtype that an operation computes in: float64 if any input tensor is float64, else float32."""
    tensors = (value for value in inputs if isinstance(value, Tensor))
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def converted(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`tensor.to(dtype)` of a tensor that may be missing."""
    return None if tensor is None else tensor.to(dtype)


def _mixture(selection: str, scaled: Tensor, best: Tensor, actions: Tensor, oracle: Tensor | None) -> Tensor:
    """The method's table: the action embedding that each sentence is conditioned on, `[S, A]`."""
    if selection in MIXED:
        return scaled.softmax(dim=1) @ actions
    picked = PICKED[selection](best, actions, oracle)
    if selection in STRAIGHT_THROUGH:
        soft = scaled.softmax(dim=1) @ actions.detach()
        picked = picked + (soft - soft.detach())
    return picked


PICKED: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    **dict.fromkeys(("hard", *STRAIGHT_THROUGH), lambda best, actions, oracle: F.embedding(best, actions)),
    "oracle": lambda best, actions, oracle: F.embedding(oracle.clamp(min=0), actions).masked_fill(
        (oracle < 0)[:, None], torch.nan
    ),
    "uniform": lambda best, actions, oracle: actions.mean(dim=0).expand(len(best), -1),
    "fixed": lambda best, actions, oracle: actions[0].expand(len(best), -1),
}
"""What the selections that do not mix give each sentence, `[S, A]`: from the most probable actions `[S]`, the codebook
`[K, A]` and the oracle actions `[S]`."""

SELECTIONS = (*MIXED, *PICKED)


def mix_oracle(mixture: Tensor, actions: Tensor, oracle: Tensor, oracle_weight: float | Tensor) -> Tensor:
    """`(1 - w) * mixture + w * actions[oracle]`, with w = 0 in sentences without an oracle action."""
    weight = torch.as_tensor(oracle_weight, dtype=mixture.dtype, device=mixture.device)
    weight = weight.expand(oracle.shape).masked_fill(oracle < 0, 0.0)[:, None]  # [S, 1]
    return (1 - weight) * mixture + weight * F.embedding(oracle.clamp(min=0), actions)


def _all_but_largest(scores: Tensor, count: int) -> Tensor:
    """True on all but the `count` largest of each row; among equals the lowest index is kept (a stable sort)."""
    kept = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter(1, kept, False)
