"""Planner softmax, mixture of the action embeddings and projection into the LM's space as one operation.

With scores `s = logits` (plus `noise`, less all but the `top_k` largest) and `p = softmax(s / temperature)`:

    m = sum_k p[k] codebook[k]              (`soft`; the method's table for the other selections)
    m = (1 - w) m + w codebook[oracle]      (w = oracle_weight; 0 in sentences without an oracle action)
    projected = weight m + bias
    log_normalizer = logsumexp(s / temperature)
    oracle_nll = logsumexp(logits) - logits[oracle]

Sizes: S sentences, K actions, A action-embedding size, D plan size (layers stacked), P planner state.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .backend import Backend, choose, full_precision
from .checks import check_hidden, check_logits, check_projection
from .operators import ProjectionInputs, first_derivative_only
from .reference import MIXED, PICKED, STRAIGHT_THROUGH, PlanProjection, converted, mix_oracle, working_dtype

STREAMED_BYTES = 1 << 30
"""Of probabilities `[S, K]` from which on there are to be none, and no gradient of theirs."""


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
        oracle (Tensor | None): oracle actions, int64 `[S]`; negative: the sentence has none.
        oracle_weight (float | Tensor): weight w of the oracle action, 0 to 1; one number or `[S]`.
        noise (Tensor | None): added to the logits, `[S, K]`; for the gumbel selections only.
        top_k (int | None): actions kept, 1 to K; for "top-k" only, which needs it.

    Returns:
        PlanProjection: `projected [S, D]`, in the promoted dtype of codebook and weight; `log_normalizer [S]` and
        `oracle_nll [S]` (0 in sentences without an oracle action), float32, or float64 where an input is float64.

    Raises:
        ValueError: a wrong argument, by name. Values inside tensors are checked on CPU only; on other devices "oracle"
            gives NaN in sentences without an oracle action.
        RuntimeError: a second derivative was asked for.
    """
    check_logits(logits)
    inputs = ProjectionInputs(
        logits, None, None, codebook, weight, bias, noise, oracle, oracle_weight, temperature, top_k
    )
    return _project(inputs, selection)


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
        codebook, weight, bias, temperature, selection, oracle, oracle_weight, noise, top_k: as for `plan_projection`.

    Returns:
        PlanProjection: as for `plan_projection`.

    Raises:
        ValueError, RuntimeError: as for `plan_projection`.
    """
    check_hidden(hidden, head, head_bias)
    inputs = ProjectionInputs(
        hidden, head, head_bias, codebook, weight, bias, noise, oracle, oracle_weight, temperature, top_k
    )
    return _project(inputs, selection)


def _project(inputs: ProjectionInputs, selection: str) -> PlanProjection:
    check_projection(inputs, selection)
    operation, operands = "plan_projection", ["codebook", "weight"]
    if inputs.head is not None:
        operation, operands = "plan_projection_from_hidden", ["source", "head", *operands]
    device = inputs.source.device
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        cast: dict[str, Any] = {name: _autocast(getattr(inputs, name)) for name in operands}
        inputs = inputs._replace(**cast)
    backend = choose(operation, device, working_dtype(*inputs))
    with full_precision(device):
        if torch.is_grad_enabled() and (backend is None or not backend.is_eager):
            inputs = ProjectionInputs._make([first_derivative_only(value) for value in inputs])
        if backend is None:
            return reference.plan_projection(inputs, selection)
        return _on_operators(backend, inputs, selection)


def _on_operators(backend: Backend, inputs: ProjectionInputs, selection: str) -> PlanProjection:
    """From the public arguments to a backend's operator: dtypes, order of association and the selections.

    The operator computes the soft mixture, as `soft`, `gumbel` and `top-k` want it. The other selections pick rows of
    the codebook, which is torch's business; of the operator they take the statistics and, for a straight-through
    gradient, the soft mixture.
    """
    source, head, head_bias, codebook, weight, bias, noise, oracle, oracle_weight, temperature, top_k, _ = inputs
    assert codebook is not None and weight is not None
    result = torch.promote_types(codebook.dtype, weight.dtype)
    codebook, weight = codebook.to(backend.matrices(result)), weight.to(backend.matrices(result))
    if head is None:
        source = source.to(backend.vectors(source.dtype))
    else:
        states = backend.matrices(torch.promote_types(source.dtype, head.dtype))
        source, head = source.to(states), head.to(states)
    if noise is not None:
        noise = noise.to(backend.vectors(noise.dtype))
    oracle_weight = _oracle_weights(oracle, oracle_weight, backend.working)

    def run(codebook: Tensor | None, weight: Tensor | None, bias: Tensor | None, oracle_weight: Tensor | None) -> Any:
        call = ProjectionInputs(
            source, head, head_bias, codebook, weight, bias, noise, oracle, oracle_weight, temperature, top_k or 0, True
        )
        return backend.plan_projection(*(call if backend.name == "cpp" else call._replace(streamed=_is_streamed(call))))

    if selection in MIXED:
        if _actions_first(backend, len(source), codebook, weight):
            if backend.name == "cpp" and backend.working == torch.float32:
                codebook, weight = codebook.float(), weight.float()
            projected, log_normalizer, oracle_nll, *_ = run(F.linear(codebook, weight), None, bias, oracle_weight)
        else:
            projected, log_normalizer, oracle_nll, *_ = run(codebook, weight, bias, oracle_weight)
        return PlanProjection(projected.to(result), log_normalizer, oracle_nll)

    soft_gradient = selection in STRAIGHT_THROUGH and torch.is_grad_enabled()
    soft, log_normalizer, oracle_nll, best, *_ = run(codebook.detach() if soft_gradient else None, None, None, None)
    actions = codebook.to(backend.working)
    mixture = PICKED[selection](best, actions, oracle)  # [S, A]
    if soft_gradient:
        mixture = mixture + (soft - soft.detach())
    if oracle is not None and oracle_weight is not None:
        mixture = mix_oracle(mixture, actions, oracle, oracle_weight)
    projected = F.linear(mixture.to(weight.dtype), weight, converted(bias, weight.dtype))
    return PlanProjection(projected.to(result), log_normalizer, oracle_nll)


def _is_streamed(inputs: ProjectionInputs) -> bool:
    """Whether the streamed form is to run on CUDA: by a rule, or as measured there for sizes like these.

    The rule is one of memory: the library's products are as fast as any (docs/kernels.md).
    """
    width = 2 if inputs.codebook is None else inputs.codebook.element_size()
    rule = inputs.source.shape[0] * inputs.num_actions * width >= STREAMED_BYTES
    if torch.compiler.is_compiling():
        return rule
    from .triton_projection import is_streamed

    return is_streamed(inputs, rule)


def _actions_first(backend: Backend, num_sentences: int, codebook: Tensor, weight: Tensor) -> bool:
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
    return dearer * num_actions * plan_size * (size + num_sentences) < num_sentences * size * (num_actions + plan_size)


def _oracle_weights(oracle: Tensor | None, weight: Tensor | float | None, working: torch.dtype) -> Tensor | None:
    """The oracle's weights, `[S]`; None where they are certainly zero."""
    if isinstance(weight, Tensor):
        return weight.to(working)
    if oracle is None or not weight:
        return None
    return torch.full(oracle.shape, weight, dtype=working, device=oracle.device)


def _autocast(operand: Tensor) -> Tensor:
    """A matrix product's operand in the dtype that autocast gives it."""
    return operand if operand.dtype == torch.float64 else operand.to(torch.get_autocast_dtype(operand.device.type))
