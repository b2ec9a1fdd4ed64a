"""The operations as `torch.library` operators: schemas, shapes without data, and gradients, the same for every backend.

`planlm::` holds the C++ implementation for the CPU (csrc/) and the Triton one for CUDA; `planlm_interpreted::` the
Triton one on CPU tensors, through Triton's interpreter, which is how it is tested where there is no GPU. On CUDA only
torch.compile calls them: in eager mode the dispatcher would take longer than the work of a small model, and plain
autograd functions take their place (`triton_projection.PlanProjection`, `triton_addition.AddPlan`). A backend has
`plan_projection`, `plan_projection_backward`, `add_plan` and `add_plan_backward`; docs/kernels.md has their contract.
On the CPU csrc/operators.cpp takes the place of `add_plan`'s rules below, and there is `packed_attention`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .contract import ProjectionInputs, ProjectionNeeds, projection_outputs
from .derivatives import once, refuse

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
