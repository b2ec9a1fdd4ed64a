"""Planner softmax, mixture of the action embeddings and projection into the LM's space as one operation.

With scores `s = logits` (plus `noise`, less all but the `top_k` largest) and `p = softmax(s / temperature)`:

    m = sum_k p[k] codebook[k]              (`soft`; the method's table for the other selections)
    m = (1 - w) m + w codebook[oracle]      (w = oracle_weight; 0 on rows without an oracle action)
    projected = weight m + bias
    log_normalizer = logsumexp(s / temperature)
    oracle_nll = logsumexp(logits) - logits[oracle]

Sizes: S sentences, K actions, A action-embedding size, D plan size (layers stacked), P planner state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fused, reference
from .backend import choose, full_precision
from .checks import PlanOptions, check_plan_projection, check_plan_projection_from_hidden
from .derivatives import first_derivative_only
from .reference import PlanProjection, working_dtype


def plan_projection(
    logits: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    selection: str = "soft",
    oracle: Tensor | None = None,
    oracle_weight: float | Tensor = 0.0,
    noise: Tensor | None = None,
    top_k: int | None = None,
) -> PlanProjection:
    """Project the planner's mixture of action embeddings into the LM's space.

    Selections, after the table of docs/method.md ("gradient" is the one that reaches `logits` through `projected`):

    - "soft": `softmax(logits / temperature) @ codebook`.
    - "hard": `codebook[argmax logits]`, no gradient.
    - "straight-through": forward as "hard", gradient as "soft".
    - "gumbel", "gumbel-hard": "soft" and "straight-through" of `logits + noise`; noise None (evaluation) adds none.
    - "top-k": "soft" over the `top_k` largest logits, renormalised.
    - "oracle": `codebook[oracle]`; "uniform": the mean action; "fixed": `codebook[0]`; no gradient.

    Among equal logits the lowest index counts as the largest. Half-precision inputs are computed in float32 and
    rounded once. Under autocast, codebook and weight are cast to its dtype, as for any matrix product; the logits are
    left alone. Differentiable in every floating input, once.

    Args:
        logits (Tensor): planner logits, `[S, K]`.
        codebook (Tensor): action embeddings, `[K, A]`.
        weight (Tensor): projection into the LM, `[D, A]`; several layers may be stacked in D.
        bias (Tensor | None): `[D]`.
        temperature (float): divides the scores; above 0.
        selection (str): see above.
        oracle (Tensor | None): oracle actions, int64 `[S]`; negative: the row has none.
        oracle_weight (float | Tensor): share w of the oracle action, 0 to 1; one number or `[S]`.
        noise (Tensor | None): added to the logits, `[S, K]`; for the gumbel selections only.
        top_k (int | None): actions kept, 1 to K; for "top-k" only, which needs it.

    Returns:
        PlanProjection: `projected [S, D]`, in the promoted dtype of codebook and weight; `log_normalizer [S]` and
        `oracle_nll [S]` (0 on rows without an oracle action), float32, or float64 where an input is float64.

    Raises:
        ValueError: a wrong argument, by name. Values inside tensors are checked on CPU only; on other devices "oracle"
            gives NaN in rows without an oracle action.
        RuntimeError: a second derivative was asked for.
    """
    options: PlanOptions = {
        "temperature": temperature,
        "selection": selection,
        "oracle": oracle,
        "oracle_weight": oracle_weight,
        "noise": noise,
        "top_k": top_k,
    }
    check_plan_projection(logits, codebook, weight, bias, **options)
    inputs = (logits, _autocast(codebook), _autocast(weight), bias)
    backend = choose("plan_projection", logits.device, working_dtype(*inputs, noise, oracle_weight))
    with full_precision(logits.device):
        source, actions, projection, offset = (first_derivative_only(value) for value in inputs)
        assert source is not None and actions is not None and projection is not None
        if backend is None:
            return reference.plan_projection(source, actions, projection, offset, **_guarded(options))
        return fused.plan_projection(backend, source, None, None, actions, projection, offset, **_guarded(options))


def plan_projection_from_hidden(
    hidden: Tensor,
    head: Tensor,
    head_bias: Tensor | None,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    selection: str = "soft",
    oracle: Tensor | None = None,
    oracle_weight: float | Tensor = 0.0,
    noise: Tensor | None = None,
    top_k: int | None = None,
) -> PlanProjection:
    """`plan_projection` of the logits `hidden @ head.T + head_bias`, which need not exist in memory.

    Half-precision logits are never formed: they are computed, and used, in float32. Under autocast, hidden and head
    are cast to its dtype like codebook and weight.

    Args:
        hidden (Tensor): planner states, `[S, P]`.
        head (Tensor): the planner's output layer, `[K, P]`.
        head_bias (Tensor | None): `[K]`.
        codebook (Tensor): action embeddings, `[K, A]`.
        weight (Tensor): projection into the LM, `[D, A]`.
        bias (Tensor | None): `[D]`.
        temperature, selection, oracle, oracle_weight, noise, top_k: as for `plan_projection`.

    Returns:
        PlanProjection: as for `plan_projection`.

    Raises:
        ValueError, RuntimeError: as for `plan_projection`.
    """
    options: PlanOptions = {
        "temperature": temperature,
        "selection": selection,
        "oracle": oracle,
        "oracle_weight": oracle_weight,
        "noise": noise,
        "top_k": top_k,
    }
    check_plan_projection_from_hidden(hidden, head, head_bias, codebook, weight, bias, **options)
    inputs = (_autocast(hidden), _autocast(head), head_bias, _autocast(codebook), _autocast(weight), bias)
    backend = choose("plan_projection_from_hidden", hidden.device, working_dtype(*inputs, noise, oracle_weight))
    with full_precision(hidden.device):
        states, output, shift, actions, projection, offset = (first_derivative_only(value) for value in inputs)
        assert states is not None and output is not None and actions is not None and projection is not None
        given = (states, output, shift, actions, projection, offset)
        if backend is None:
            return reference.plan_projection_from_hidden(*given, **_guarded(options))
        return fused.plan_projection(backend, *given, **_guarded(options))


def _guarded(options: PlanOptions) -> PlanOptions:
    """The options, with second derivatives refused in those that have a first."""
    weight = options["oracle_weight"]
    return {
        **options,
        "oracle_weight": first_derivative_only(weight) if isinstance(weight, Tensor) else weight,
        "noise": first_derivative_only(options["noise"]),
    }


def _autocast(operand: Tensor) -> Tensor:
    """A matrix product's operand in the dtype that autocast would give it."""
    device = operand.device.type
    if operand.dtype == torch.float64 or not (
        torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    ):
        return operand
    return operand.to(torch.get_autocast_dtype(device))
