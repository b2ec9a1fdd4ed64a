"""`add_plan` on CUDA: one gather-and-add, and a segment sum that finds its tokens by itself.

    out[t] = x[t] + gate * plan[segment_ids[t]]
    grad_plan[s] = gate * sums[s]        grad_gate = sum_s plan[s] * sums[s]        sums[s] = sum of s's tokens of grad

The ids are sorted but for holes (-1) anywhere. A program of the backward owns a few neighbouring segments: it probes
the ids for a token before the first of them and walks on from there, so neither an index of the segments nor an atomic
is needed and the order of every sum is fixed.

Sizes: T tokens, S sentences, D plan size. Optional tensors are None at compile time.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_numerics import Matrix, load_rows, load_tile, load_vector, rounded
from .triton_tiles import Tiles, choose_tiles, launch, with_unit_columns

OPERATORS = ("add_plan", "add_plan_backward")
"""What this backend implements here; `operators` has the schemas."""

_SEGMENTS = 4
"""Segments of one backward program. They share its search, and a row of partial sums of the gate's gradient, in a
scratch of `[S / 4, D]`. More of them would leave too few programs where S is in the hundreds."""


@triton.jit
def add_plan_fwd_kernel(
    x, plan, segment_ids, gate, out, num_tokens, num_segments, size, x_stride, plan_stride,
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
    at = out + tokens.to(tl.int64)[:, None] * size + columns[None, :]
    tl.store(at, tl.where((segments >= 0)[:, None], added, state), mask=inside)


@triton.jit
def _token_before(segment_ids, segment, num_tokens, PROBES: tl.constexpr):
    # Where no token of `segment` or a later one lies before: two rounds of probes narrow T to T / PROBES^2 or so.
    # Probes that hit holes tell nothing, which costs time and not correctness.
    low = tl.zeros((), tl.int32)
    high = low + num_tokens
    for _ in range(2):
        step = tl.maximum(tl.cdiv(high - low, PROBES), 1)
        at = low + tl.arange(0, PROBES) * step
        ids = tl.load(segment_ids + at, mask=at < high, other=-1)
        earlier = (ids >= 0) & (ids < segment)
        high = tl.minimum(high, tl.min(tl.where(ids >= segment, at, num_tokens), 0))
        low = tl.maximum(low, tl.max(tl.where(earlier, at + 1, 0), 0))
    return low


@triton.jit
def add_plan_bwd_kernel(
    grad, plan, segment_ids, gate, grad_plan, gate_partials, num_tokens, num_segments, size, grad_stride, plan_stride,
    grad_plan_stride, SEGMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient of SEGMENTS plans and their part of the gate's, `[S / SEGMENTS, D]`. Grid: groups of segments, D."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(0) * SEGMENTS
    token = _token_before(segment_ids, first, num_tokens, 128)
    of_gate = tl.zeros((COLUMNS,), tl.float32)
    for segment in range(first, tl.minimum(first + SEGMENTS, num_segments)):
        sums = tl.zeros((COLUMNS,), tl.float32)
        highest = tl.full((), -1, tl.int64)
        while (token < num_tokens) & (highest <= segment):
            tokens = token + tl.arange(0, ROWS)
            ids = tl.load(segment_ids + tokens, mask=tokens < num_tokens, other=-1)
            mine = (ids == segment)[:, None] & (columns < size)[None, :]
            at = grad + tokens.to(tl.int64)[:, None] * grad_stride + columns[None, :]
            sums += tl.sum(tl.load(at, mask=mine, other=0.0).to(tl.float32), 0)
            highest = tl.max(ids, 0)
            # The next segment may begin in this window: it starts with it again.
            token = tl.where(highest <= segment, token + ROWS, token)
        wide = tl.zeros((), tl.int64) + segment
        if gate_partials is not None:
            of_gate += sums * load_vector(plan + wide * plan_stride, columns, size).to(tl.float32)
        if grad_plan is not None:
            if gate is not None:
                sums *= load_vector(gate, columns, size).to(tl.float32)
            to = grad_plan + wide * grad_plan_stride + columns
            tl.store(to, rounded(sums, grad_plan.dtype.element_ty), mask=columns < size)
    if gate_partials is not None:
        tl.store(gate_partials + tl.program_id(0).to(tl.int64) * size + columns, of_gate, mask=columns < size)


def add_plan(x: Tensor, plan: Tensor, segment_ids: Tensor, gate: Tensor | None) -> Tensor:
    """`planlm.kernels.add_plan` for checked arguments; the result is contiguous."""
    num_tokens, size = x.shape
    x, plan, segment_ids = with_unit_columns(x), with_unit_columns(plan), segment_ids.contiguous()
    gate = None if gate is None else gate.contiguous()
    out = torch.empty(num_tokens, size, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out

    def run(tiles: Tiles) -> None:
        launch(
            add_plan_fwd_kernel, (triton.cdiv(num_tokens, tiles.rows), triton.cdiv(size, tiles.columns)), tiles,
            reads=(x, plan, segment_ids, gate), writes=(out,),
            x=x, plan=plan, segment_ids=segment_ids, gate=gate, out=out, num_tokens=num_tokens,
            num_segments=len(plan), size=size,
        )  # fmt: skip

    run(choose_tiles("add_plan_fwd", (size,), x, plan, trial=run))
    return out


def add_plan_backward(
    grad: Tensor,
    plan: Tensor,
    segment_ids: Tensor,
    gate: Tensor | None,
    needs: list[bool],
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of plan and gate; that of x is `grad` itself.

    Args:
        grad (Tensor): gradient of the result, `[T, D]`.
        plan, segment_ids, gate: as in the forward.
        needs (list[bool]): whether to compute the gradient of plan, and that of gate.
        into (Tensor | None): where plan's goes, `[S, D]` with adjacent columns; None: a new matrix.

    Returns:
        tuple[Tensor, Tensor]: `[S, D]` in plan's dtype and `[D]` in gate's; an empty tensor for one that is not needed.
    """
    num_segments, size = plan.shape
    grad, segment_ids = with_unit_columns(grad), segment_ids.contiguous()
    gate = None if gate is None else gate.contiguous()
    grad_plan = plan.new_empty(plan.shape) if into is None and needs[0] else into
    num_groups, gate_partials = triton.cdiv(num_segments, _SEGMENTS), None
    if needs[1] and gate is not None:  # else the plan is only asked for its shape: it need not have values
        plan = with_unit_columns(plan)
        gate_partials = plan.new_empty(num_groups, size, dtype=torch.float32)

    def run(tiles: Tiles) -> None:
        launch(
            add_plan_bwd_kernel, (num_groups, triton.cdiv(size, tiles.columns)), tiles,
            reads=(grad, None if gate_partials is None else plan, segment_ids, gate),
            writes=(grad_plan, gate_partials),
            grad=grad, plan=plan, segment_ids=segment_ids, gate=gate, grad_plan=grad_plan,
            gate_partials=gate_partials, num_tokens=len(grad), num_segments=num_segments, size=size,
            SEGMENTS=_SEGMENTS,
        )  # fmt: skip

    if grad_plan is not None or gate_partials is not None:
        run(choose_tiles("add_plan_bwd", (size,), grad, plan, trial=run))
    nothing = grad.new_empty(0)
    return (
        nothing if grad_plan is None else grad_plan,
        nothing if gate is None or gate_partials is None else gate_partials.sum(0).to(gate.dtype),
    )
