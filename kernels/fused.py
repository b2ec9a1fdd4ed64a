"""From the public arguments to the operators: dtypes, order of association and the selections.

The operators compute the soft mixture, as `soft`, `gumbel` and `top-k` want it. The other selections pick rows of the
codebook, which is torch's business; of the operators they take the statistics and, for a straight-through gradient,
the soft mixture.

Sizes: S sentences, K actions, A action-embedding size, D plan size (layers stacked), P planner state.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Backend
from .reference import MIXED, PICKED, STRAIGHT_THROUGH, PlanProjection, mix_oracle, working_dtype


def plan_projection(
    backend: Backend,
    source: Tensor,
    head: Tensor | None,
    head_bias: Tensor | None,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    temperature: float,
    selection: str,
    oracle: Tensor | None,
    oracle_weight: float | Tensor,
    noise: Tensor | None,
    top_k: int | None,
) -> PlanProjection:
    """`reference.plan_projection` of logits `source` `[S, K]`; with a head, from the planner's states `[S, P]`."""
    result = torch.promote_types(codebook.dtype, weight.dtype)
    working = working_dtype(source, head, head_bias, codebook, weight, bias, noise, oracle_weight)
    if working == torch.float64:
        source, head = source.to(working), _to(working, head)
        codebook, weight, noise = codebook.to(working), weight.to(working), _to(working, noise)
    else:
        matrices = backend.matrices(result)
        codebook, weight = codebook.to(matrices), weight.to(matrices)
        states = backend.vectors(source.dtype)
        if head is not None:
            states = backend.matrices(torch.promote_types(source.dtype, head.dtype))
        source, head = source.to(states), _to(states, head)
        noise = None if noise is None else noise.to(backend.vectors(noise.dtype))
    share = _share(oracle, oracle_weight, working)

    def run(codebook: Tensor | None, weight: Tensor | None, bias: Tensor | None, share: Tensor | None) -> Any:
        return backend.operators.plan_projection(
            source, head, head_bias, codebook, weight, bias, noise, oracle, share, temperature, top_k or 0
        )

    if selection in MIXED:
        if _actions_first(backend, len(source), codebook, weight):
            if backend.name == "cpp" and working == torch.float32:
                codebook, weight = codebook.float(), weight.float()
            projected, log_normalizer, oracle_nll, *_ = run(F.linear(codebook, weight), None, bias, share)
        else:
            projected, log_normalizer, oracle_nll, *_ = run(codebook, weight, bias, share)
        return PlanProjection(projected.to(result), log_normalizer, oracle_nll)

    soft_gradient = selection in STRAIGHT_THROUGH and torch.is_grad_enabled()
    soft, log_normalizer, oracle_nll, best, *_ = run(codebook.detach() if soft_gradient else None, None, None, None)
    actions = codebook.to(working)
    mixture = PICKED[selection](best, actions, oracle)  # [S, A]
    if soft_gradient:
        mixture = mixture + (soft - soft.detach())
    if share is not None:
        assert oracle is not None
        mixture = mix_oracle(mixture, actions, oracle, share)
    projected = F.linear(mixture.to(weight.dtype), weight, _to(weight.dtype, bias))
    return PlanProjection(projected.to(result), log_normalizer, oracle_nll)


def _actions_first(backend: Backend, num_rows: int, codebook: Tensor, weight: Tensor) -> bool:
    """Whether `p (E W^T)` is cheaper than `(p E) W^T`.

    By products, of which a GPU has to save half: three more launches cost as much as 10^10 of them. The gradient of
    `E W^T` is summed over all sentences and then multiplied with E; rounded to half precision in between it would cost
    few actions more accuracy than `(p E) W^T` does. So the CPU takes float32 there, at a third of the speed, and Triton
    the second form below 256 actions.
    """
    (num_actions, size), plan_size, half = codebook.shape, len(weight), codebook.dtype.itemsize == 2
    if backend.name == "triton" and half and num_actions < 256:
        return False
    dearer = 2 if backend.name == "triton" else 3 if half else 1
    return dearer * num_actions * plan_size * (size + num_rows) < num_rows * size * (num_actions + plan_size)


def add_plan(backend: Backend, x: Tensor, plan: Tensor, segment_ids: Tensor, gate: Tensor | None) -> Tensor:
    """`reference.add_plan` on a backend's operators."""
    if working_dtype(x, plan, gate) == torch.float64:
        states, plan = x.to(torch.float64), plan.to(torch.float64)
    else:
        states, plan = x.to(backend.vectors(x.dtype)), plan.to(backend.vectors(plan.dtype))
    added: Tensor = backend.operators.add_plan(states, plan, segment_ids, gate)
    return added.to(x.dtype)


def _to(dtype: torch.dtype, value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(dtype)


def _share(oracle: Tensor | None, oracle_weight: float | Tensor, working: torch.dtype) -> Tensor | None:
    """The oracle's share as a tensor `[S]`, None where it is certainly zero."""
    if oracle is None or (not isinstance(oracle_weight, Tensor) and oracle_weight == 0):
        return None
    if isinstance(oracle_weight, Tensor):
        return oracle_weight.to(working)
    return torch.full(oracle.shape, oracle_weight, dtype=working, device=oracle.device)
