"""`add_plan` on CUDA: one gather-and-add, and a segment sum that finds its tokens by itself.

    out[t] = x[t] + gate * plan[segment_ids[t]]
    grad_plan[s] = gate * sums[s]        grad_gate = sum_s plan[s] * sums[s]        sums[s] = sum of s's tokens of grad

The ids are sorted but for holes (-1) anywhere. A program of the backward owns a segment, whose tokens lie within bounds
that all layers share, so no atomic is needed and the order of every sum is fixed.

Sizes: T tokens, S sentences, D plan size. Optional tensors are None at compile time.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operators import once
from .triton_device import Matrix, load_rows, load_tile, load_vector, rounded
from .triton_launch import INTERPRETED, Tiles, launch_ordered, with_unit_columns

OPERATORS = ("add_plan", "add_plan_backward")
"""What this backend implements here; `operators` has the schemas."""

_CONTIGUOUS = torch.contiguous_format
_FORWARD, _INTERPRETED = Tiles(16, 256), Tiles(16, 16)
_BACKWARD = Tiles(32, 128)  # most sentences are one step of a program, two steps are two waits for memory


@triton.jit
def add_plan_fwd_kernel(
    x, plan, segment_ids, gate, out_x, num_tokens, num_segments, size, x_stride, plan_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tokens with an id get their plan, in float32 and rounded once; the others are copied. Grid: T by D tiles."""
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    segments = tl.load(segment_ids + tokens, mask=tokens < num_tokens, other=-1)
    state = load_tile(Matrix(x, x_stride, num_tokens, size), tokens[:, None], columns[None, :])
    planned = load_rows(Matrix(plan, plan_stride, num_segments, size), segments, columns)
    if gate is not None:
        planned *= load_vector(gate, columns, size).to(tl.float32)[None, :]
    added = rounded(state.to(tl.float32) + planned, state.dtype)
    inside = (tokens < num_tokens)[:, None] & (columns < size)[None, :]
    at = out_x + tokens.to(tl.int64)[:, None] * size + columns[None, :]
    tl.store(at, tl.where((segments >= 0)[:, None], added, state), mask=inside)


@triton.jit
def add_plan_bwd_kernel(
    grad, plan, bounds, segment_ids, gate, out_plan, out_gate_parts, size,
    grad_stride, plan_stride, out_plan_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient of a plan, and its part of the gate's `[S, D]`, each where its tensor is given. Grid: D within segments.

    Programs that run side by side read rows that lie side by side, whole. Gradients are asked for with the ids, not
    after them: the few tokens without a segment cost less than waiting twice.
    """
    tiles = tl.cdiv(size, COLUMNS)
    segment = tl.program_id(0) // tiles
    columns = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    inside = columns < size
    sums = tl.zeros((COLUMNS,), tl.float32)
    for token in range(begin, end, ROWS):
        tokens = token + tl.arange(0, ROWS)
        ids = tl.load(segment_ids + tokens, mask=tokens < end, other=-1)
        at = grad + tokens.to(tl.int64)[:, None] * grad_stride + columns[None, :]
        found = tl.load(at, mask=(tokens < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        sums += tl.sum(tl.where((ids == segment)[:, None], found, 0.0), 0)  # not a product: it may be infinite
    wide = segment.to(tl.int64)
    if out_gate_parts is not None:
        planned = tl.load(plan + wide * plan_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_gate_parts + wide * size + columns, sums * planned, mask=inside)
    if out_plan is not None:
        if gate is not None:
            sums *= load_vector(gate, columns, size).to(tl.float32)
        to = out_plan + wide * out_plan_stride + columns
        tl.store(to, rounded(sums, out_plan.dtype.element_ty), mask=inside)


def add_plan(x: Tensor, plan: Tensor, segment_ids: Tensor, gate: Tensor | None) -> Tensor:
    """`planlm.kernels.add_plan` for checked arguments; the result is contiguous."""
    num_tokens, size = x.shape
    x, plan, out = with_unit_columns(x), with_unit_columns(plan), torch.empty_like(x, memory_format=_CONTIGUOUS)
    if num_tokens == 0 or size == 0:
        return out
    tiles = _INTERPRETED if INTERPRETED else _FORWARD
    launch_ordered(
        add_plan_fwd_kernel, (-(-num_tokens // tiles.rows), -(-size // tiles.columns), 1), tiles,
        (x, plan, segment_ids.contiguous(), None if gate is None else gate.contiguous(), out, num_tokens, plan.shape[0],
         size, x.stride(0), plan.stride(0), tiles.rows, tiles.columns),
    )  # fmt: skip
    return out


def add_plan_backward(
    grad: Tensor, plan: Tensor, segment_ids: Tensor, gate: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of plan and gate; that of x is `grad` itself.

    Args:
        grad (Tensor): gradient of the result, `[T, D]`.
        plan, segment_ids, gate: as in the forward.
        needs (list[bool]): whether to compute the gradient of plan, and that of gate.

    Returns:
        tuple[Tensor, Tensor]: `[S, D]` in plan's dtype and `[D]` in gate's; an empty tensor for one that is not needed.
    """
    to_plan, to_gate = needs
    into = plan.new_empty(plan.shape) if to_plan else None
    grad_gate = None
    if to_plan or to_gate:
        bounds = segment_bounds(segment_ids, len(plan))
        grad_gate = sum_segments(grad, segment_ids, bounds, gate, into, plan if to_gate and gate is not None else None)
    nothing = grad.new_empty(0)
    return nothing if into is None else into, nothing if grad_gate is None else grad_gate


def sum_segments(
    grad: Tensor, segment_ids: Tensor, bounds: Tensor, gate: Tensor | None, into: Tensor | None, plan: Tensor | None
) -> Tensor | None:
    """Write the plan's gradient into `into [S, D]`, with adjacent columns; given the plan, return the gate's."""
    grad, parts = grad if grad.stride(1) == 1 else grad.contiguous(), None
    if plan is not None:
        plan = with_unit_columns(plan)
        parts = plan.new_empty(plan.shape, dtype=torch.float32)
    num_segments, size = bounds.shape[0] - 1, grad.shape[1]
    tiles = _INTERPRETED if INTERPRETED else _BACKWARD
    if num_segments and size and (into is not None or parts is not None):
        launch_ordered(
            add_plan_bwd_kernel, (num_segments * -(-size // tiles.columns), 1, 1), tiles,
            (grad, plan, bounds, segment_ids.contiguous(), None if gate is None else gate.contiguous(), into, parts,
             size, grad.stride(0), 0 if plan is None else plan.stride(0), 0 if into is None else into.stride(0),
             tiles.rows, tiles.columns),
        )  # fmt: skip
    return None if parts is None or gate is None else parts.sum(0).to(gate.dtype)


def segment_bounds(segment_ids: Tensor, num_segments: int) -> Tensor:
    """Where the tokens of each segment lie: those of segment s in `bounds[s]:bounds[s + 1]`, int32 `[S + 1]`.

    Tokens without a segment lie anywhere among them. The collator makes the same on the host, once a batch.
    """
    if len(segment_ids) == 0:
        return segment_ids.new_zeros(num_segments + 1, dtype=torch.int32)
    segments = torch.arange(num_segments + 1, device=segment_ids.device)
    return torch.searchsorted(segment_ids.cummax(0).values, segments, out_int32=True)


class AddPlan(torch.autograd.Function):
    """`add_plan`, differentiable once.

    With `stacked` the plan is that of a layer of a `StackedPlan`, whose gradients lie side by side in one matrix.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plan: Tensor, segment_ids: Tensor, gate: Tensor | None, stacked: Any, layer: int
    ) -> Tensor:
        ctx.stacked, ctx.layer, ctx.num_segments, ctx.dtype = stacked, layer, plan.shape[0], plan.dtype
        ctx.save_for_backward(segment_ids, gate, None if gate is None else plan)  # without a gate its memory is let go
        return add_plan(x, plan, segment_ids, gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        segment_ids, gate, plan = ctx.saved_tensors
        to_x, to_plan, _, to_gate, *_ = ctx.needs_input_grad
        again = torch.is_grad_enabled()
        grad_plan = grad_gate = None
        if to_plan or to_gate:
            stacked, count = ctx.stacked, ctx.num_segments
            bounds = (segment_bounds if stacked is None else stacked.bounds)(segment_ids, count)
            if to_plan:
                if stacked is not None and not again:
                    grad_plan = stacked.columns(ctx.layer, grad, ctx.dtype, count)
                if grad_plan is None:
                    grad_plan = grad.new_empty((count, grad.shape[1]), dtype=ctx.dtype)
            grad_gate = sum_segments(grad, segment_ids, bounds, gate, grad_plan, plan if to_gate else None)
        gradients = grad if to_x else None, grad_plan, None, grad_gate, None, None
        if not again:
            return gradients
        return tuple(None if value is None else once(value, grad, plan, gate) for value in gradients)
