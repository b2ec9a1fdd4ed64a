"""The operations as `torch.library` operators: what they take and return, their gradients, the same for every backend.

`planlm::` holds the C++ implementation for the CPU (csrc/) and the Triton one for CUDA; `planlm_interpreted::` the
Triton one on CPU tensors, through Triton's interpreter, which is how it is tested where there is no GPU. On CUDA only
torch.compile calls them: in eager mode the dispatcher would take longer than the work of a small model, and plain
autograd functions take their place (`triton_projection.PlanProjection`, `triton_addition.AddPlan`). A backend has
`plan_projection`, `plan_projection_backward`, `add_plan` and `add_plan_backward`, and `cross_entropy_`, which mutates
and has no gradient. On the CPU csrc/operators.cpp takes the place of `add_plan`'s rules below, and there is
`packed_attention`.

The fast backends write first derivatives out by hand, so a derivative of those would silently lack terms: it is
refused, in the same words on every backend.

Sizes: S sentences, K actions, A action-embedding size, D plan size (layers stacked), P planner state.
"""

from __future__ import annotations

import functools
from enum import IntEnum
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ProjectionInputs(NamedTuple):
    """The arguments of the operator `plan_projection`, in its order; those of the public functions, less the selection.

    Attributes:
        source: logits `[S, K]`, or with a head the planner's states `[S, P]`.
        head: `[K, P]`.
        head_bias: `[K]`.
        codebook: `[K, A]`; None: only the statistics are wanted.
        weight: `[D, A]`; None: the mixture itself is projected, D = A.
        bias: `[D]`.
        noise: `[S, K]`, added to the logits.
        oracle: int64 `[S]`; negative: none.
        oracle_weight: `[S]`, or None for 0; in the public functions `[S]` or a number.
        temperature: divides the scores.
        top_k: scores kept; 0, or None in the public functions: all.
        streamed: the form that runs on CUDA, True on a CPU; no argument of the public functions.
    """

    source: Tensor
    head: Tensor | None
    head_bias: Tensor | None
    codebook: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    noise: Tensor | None
    oracle: Tensor | None
    oracle_weight: Any
    temperature: float
    top_k: int | None
    streamed: bool = False

    @property
    def num_actions(self) -> int:
        """K."""
        return self.source.shape[1] if self.head is None else self.head.shape[0]

    @property
    def size(self) -> int:
        """A; 0 without a codebook."""
        return 0 if self.codebook is None else self.codebook.shape[1]

    @property
    def needs_raw(self) -> bool:
        """Whether the oracle's cross-entropy needs statistics other than those of the scores."""
        changed = self.noise is not None or bool(self.top_k) or self.temperature != 1.0
        return self.oracle is not None and changed


class ProjectionNeeds(NamedTuple):
    """Of which inputs `plan_projection_backward` returns the gradient; it returns them in this order."""

    source: bool
    head: bool
    head_bias: bool
    codebook: bool
    weight: bool
    bias: bool
    noise: bool
    oracle_weight: bool

    @property
    def logits(self) -> bool:
        """Whether a gradient of the logits is: theirs, or one of what they come from."""
        return self.source or self.head or self.head_bias

    @property
    def scores(self) -> bool:
        """The same of the scores."""
        return self.logits or self.noise


class ProjectionOutputs(NamedTuple):
    """What the operator `plan_projection` returns; from `best` on for its backward.

    Attributes:
        projected: `[S, D]` in the codebook's dtype.
        log_normalizer: `[S]`.
        oracle_nll: `[S]`.
        best: the action with the largest score, int64 `[S]`.
        mixture: `[S, A]`. Of the CPU and the streamed form before the oracle's embedding is mixed in; of the composed
            form after that, in the codebook's dtype, and without weight `[S, 0]`: then it is what was projected.
        statistics: `[5, S]`, rows of `Statistic`.
        tie_index: the last action that top-k keeps among those equal to the threshold, int64 `[S]`.
    """

    projected: Tensor
    log_normalizer: Tensor
    oracle_nll: Tensor
    best: Tensor
    mixture: Tensor
    statistics: Tensor
    tie_index: Tensor


class Statistic(IntEnum):
    """Rows of `statistics`; those of the logits, without noise and temperature, only where there is an oracle."""

    SCORE_MAX = 0
    SCORE_LOG_SUM = 1  # log of the sum of exp((score - SCORE_MAX) / temperature)
    LOGIT_MAX = 2
    LOGIT_LOG_SUM = 3
    THRESHOLD = 4  # the lowest score that top-k keeps


def projection_outputs(*arguments: Any) -> ProjectionOutputs:
    """Room for what `plan_projection` returns."""
    inputs = ProjectionInputs(*arguments)
    source, codebook, weight = inputs.source, inputs.codebook, inputs.weight
    num_sentences, plan_size = source.shape[0], inputs.size if weight is None else weight.shape[0]
    working = torch.float64 if source.dtype == torch.float64 else torch.float32
    real, whole = source.new_empty(0, dtype=working), source.new_empty(0, dtype=torch.int64)
    result = working if codebook is None else codebook.dtype
    mixed = inputs.size if inputs.streamed or weight is not None else 0
    return ProjectionOutputs(
        projected=source.new_empty(num_sentences, plan_size, dtype=result),
        log_normalizer=real.new_empty(num_sentences),
        oracle_nll=real.new_empty(num_sentences),
        best=whole.new_empty(num_sentences),
        mixture=source.new_empty(num_sentences, mixed, dtype=working if inputs.streamed else result),
        statistics=real.new_empty(len(Statistic), num_sentences),
        tie_index=whole.new_empty(num_sentences),
    )


def first_derivative_only(value: T) -> T:
    """The value itself; of a tensor with a gradient such that differentiating that gradient raises a RuntimeError."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return value
    return _FirstDerivativeOnly.apply(value)  # type: ignore[no-any-return, no-untyped-call]


def once(gradient: Tensor, *sources: Tensor | None) -> Tensor:
    """The gradient itself, such that differentiating it, or with respect to `sources`, raises a RuntimeError."""
    return _Refused.apply(gradient, *sources)  # type: ignore[no-any-return, no-untyped-call]


class _FirstDerivativeOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *_: Tensor | None) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return once(gradient)


class _Refused(_FirstDerivativeOnly):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        refuse()


def refuse(*_: Any) -> NoReturn:
    """The backward of every gradient."""
    raise RuntimeError(
        "planlm.kernels has first derivatives only, and a second one was asked for; "
        "leave create_graph off for losses that go through these operations"
    )


SCHEMAS = (
    # The fields of ProjectionInputs and ProjectionOutputs.
    "plan_projection(Tensor source, Tensor? head, Tensor? head_bias, Tensor? codebook, Tensor? weight, Tensor? bias, "
    "Tensor? noise, Tensor? oracle, Tensor? oracle_weight, float temperature, int top_k, bool streamed) -> "
    "(Tensor projected, Tensor log_normalizer, Tensor oracle_nll, Tensor best, Tensor mixture, Tensor statistics, "
    "Tensor tie_index)",
    "plan_projection_backward(Tensor? grad_projected, Tensor? grad_log_normalizer, Tensor? grad_oracle_nll, "
    "Tensor source, Tensor? head, Tensor? head_bias, Tensor? codebook, Tensor? weight, Tensor? bias, Tensor? noise, "
    "Tensor? oracle, Tensor? oracle_weight, Tensor best, Tensor mixture, Tensor statistics, Tensor tie_index, "
    "float temperature, int top_k, bool streamed, bool[8] needs) -> Tensor[]",
    "add_plan(Tensor x, Tensor plan, Tensor segment_ids, Tensor? gate) -> Tensor",
    "add_plan_backward(Tensor grad, Tensor plan, Tensor segment_ids, Tensor? gate, bool[2] needs) -> (Tensor, Tensor)",
    # Where a target is negative both gradient and loss are zero.
    "cross_entropy_(Tensor(a!) logits, Tensor target) -> Tensor nll",
    # On the CPU alone.
    "packed_attention(Tensor query, Tensor key, Tensor value, Tensor first, float scale) -> (Tensor out, "
    "Tensor log_sums)",
    "packed_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor log_sums, "
    "Tensor first, float scale) -> (Tensor, Tensor, Tensor)",
)


@functools.cache
def define(namespace: str) -> torch.library.Library:
    """Define the operators of a namespace, without implementations. Returns the library, to which those are added."""
    library = torch.library.Library(namespace, "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for name, fake in (
        ("plan_projection", projection_outputs),
        ("plan_projection_backward", _projection_backward_shapes),
        ("add_plan", _addition_shapes),
        ("add_plan_backward", _addition_backward_shapes),
        ("cross_entropy_", lambda logits, target: logits.new_empty(target.shape, dtype=torch.float32)),
        ("packed_attention", _attention_shapes),
        ("packed_attention_backward", _attention_backward_shapes),
    ):
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    operators = getattr(torch.ops, namespace)
    for name, keep, backward in (
        ("plan_projection", _keep_projection, _projection_backward),
        ("add_plan", keep_addition, addition_backward),
        ("packed_attention", _keep_attention, _attention_backward),
    ):
        torch.library.register_autograd(
            f"{namespace}::{name}", functools.partial(backward, operators), setup_context=keep, lib=library
        )
    # Without these a gradient would silently be a constant where a graph of it is asked for.
    for name in ("plan_projection_backward", "add_plan_backward", "packed_attention_backward"):
        torch.library.register_autograd(f"{namespace}::{name}", refuse, lib=library)
    return library


def _projection_backward_shapes(*arguments: Any) -> list[Tensor]:
    inputs, needs = ProjectionInputs(*arguments[3:12], *arguments[16:19]), arguments[19]
    values = (getattr(inputs, name) for name in ProjectionNeeds._fields)
    return [
        value.new_empty(value.shape) if needed and value is not None else inputs.source.new_empty(0)
        for value, needed in zip(values, needs, strict=True)
    ]


def _addition_shapes(x: Tensor, plan: Tensor, segment_ids: Tensor, gate: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _addition_backward_shapes(
    grad: Tensor, plan: Tensor, segment_ids: Tensor, gate: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    return (
        plan.new_empty(plan.shape) if needs[0] else grad.new_empty(0),
        gate.new_empty(gate.shape) if needs[1] and gate is not None else grad.new_empty(0),
    )


def _keep_projection(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save inputs and results of `[S]`: nothing of the probabilities' size that the caller does not hold anyway."""
    *tensors, ctx.temperature, ctx.top_k, ctx.streamed = inputs
    saved = output[3:]
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *saved)


def _projection_backward(operators: Any, ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ProjectionInputs(*ctx.needs_input_grad)
    needs = [getattr(needed, name) for name in ProjectionNeeds._fields]
    options = ctx.temperature, ctx.top_k, ctx.streamed, needs
    found = operators.plan_projection_backward(*upstream[:3], *ctx.saved_tensors, *options)
    gradients = dict(zip(ProjectionNeeds._fields, found, strict=True))
    return tuple(
        gradients[name] if wanted else None for name, wanted in zip(ProjectionInputs._fields, needed, strict=True)
    )


def keep_addition(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save what the backward of `add_plan` needs."""
    _, plan, segment_ids, gate = inputs
    if gate is None:  # of the plan only shape and dtype are wanted: its memory is let go
        plan = plan.new_empty(()).expand(plan.shape)
    ctx.save_for_backward(plan, segment_ids, gate)


def addition_backward(operators: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, plan, segment_ids (none) and gate, with the `add_plan_backward` of `operators`."""
    plan, segment_ids, gate = ctx.saved_tensors
    to_x, to_plan, _, to_gate, *_ = ctx.needs_input_grad
    grad_plan = grad_gate = None
    if to_plan or to_gate:
        grad_plan, grad_gate = operators.add_plan_backward(grad, plan, segment_ids, gate, [to_plan, to_gate])
    grad_x = (once(grad) if torch.is_grad_enabled() else grad) if to_x else None
    return grad_x, grad_plan if to_plan else None, None, grad_gate if to_gate else None


def _attention_shapes(query: Tensor, key: Tensor, value: Tensor, first: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, width, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(batch, heads, width, dtype=torch.float32)


def _attention_backward_shapes(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, first, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, first)


def _attention_backward(operators: Any, ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    gradients = operators.packed_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return *gradients, None, None
