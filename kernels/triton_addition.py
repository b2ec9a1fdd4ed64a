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

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_numerics import rounded
from .triton_tiles import Tiles, choose_tiles, launch, with_unit_columns

OPERATORS = ("add_plan", "add_plan_backward")
"""What this backend implements here; `operators` has the schemas."""

_SEGMENTS = 4
"""Segments of one backward program. They share its search, and their part of the gate's gradient is one row: a quarter
of a `[S, D]` scratch. More of them would leave too few programs where S is in the hundreds."""


@triton.jit
def add_plan_fwd_kernel(
    x, plan, segment_ids, gate, out, num_tokens, size, x_stride, plan_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tokens with an id get their plan, in float32 and rounded once; the others are copied. Grid: T by D tiles."""
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    places = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    segments = tl.load(segment_ids + tokens, mask=tokens < num_tokens, other=-1)
    inside = (tokens < num_tokens)[:, None] & (places < size)[None, :]
    planned = inside & (segments >= 0)[:, None]
    wide = tokens.to(tl.int64)[:, None]
    state = tl.load(x + wide * x_stride + places[None, :], mask=inside, other=0.0)
    row = tl.load(plan + segments[:, None] * plan_stride + places[None, :], mask=planned, other=0.0).to(tl.float32)
    if gate is not None:
        row *= tl.load(gate + places, mask=places < size, other=0.0).to(tl.float32)[None, :]
    added = rounded(state.to(tl.float32) + row, state.dtype)
    tl.store(out + wide * size + places[None, :], tl.where(planned, added, state), mask=inside)


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
    grad, plan, segment_ids, gate, grad_plan, gate_parts, num_tokens, num_segments, size, grad_stride, plan_stride,
    grad_plan_stride, SEGMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient of SEGMENTS plans and their part of the gate's, `[S / SEGMENTS, D]`. Grid: groups of segments, D."""
    places = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(0) * SEGMENTS
    token = _token_before(segment_ids, first, num_tokens, 128)
    part = tl.zeros((COLUMNS,), tl.float32)
    for segment in range(first, tl.minimum(first + SEGMENTS, num_segments)):
        sums = tl.zeros((COLUMNS,), tl.float32)
        highest = tl.full((), -1, tl.int64)
        while (token < num_tokens) & (highest <= segment):
            tokens = token + tl.arange(0, ROWS)
            ids = tl.load(segment_ids + tokens, mask=tokens < num_tokens, other=-1)
            mine = (ids == segment)[:, None] & (places < size)[None, :]
            at = grad + tokens.to(tl.int64)[:, None] * grad_stride + places[None, :]
            sums += tl.sum(tl.load(at, mask=mine, other=0.0).to(tl.float32), 0)
            highest = tl.max(ids, 0)
            # The next segment may begin in this window: it starts with it again.
            token = tl.where(highest <= segment, token + ROWS, token)
        wide = tl.zeros((), tl.int64) + segment
        if gate_parts is not None:
            part += sums * tl.load(plan + wide * plan_stride + places, mask=places < size, other=0.0).to(tl.float32)
        if grad_plan is not None:
            if gate is not None:
                sums *= tl.load(gate + places, mask=places < size, other=0.0).to(tl.float32)
            to = grad_plan + wide * grad_plan_stride + places
            tl.store(to, rounded(sums, grad_plan.dtype.element_ty), mask=places < size)
    if gate_parts is not None:
        tl.store(gate_parts + tl.program_id(0).to(tl.int64) * size + places, part, mask=places < size)


@triton.jit
def gate_bwd_kernel(
    gate_parts, grad_gate, num_parts, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Sum of the gate's parts in a fixed order. Grid: tiles of D."""
    places = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for part in range(0, num_parts, ROWS):
        rows = part + tl.arange(0, ROWS)
        inside = (rows < num_parts)[:, None] & (places < size)[None, :]
        sums += tl.load(gate_parts + rows.to(tl.int64)[:, None] * size + places[None, :], mask=inside, other=0.0)
    tl.store(grad_gate + places, rounded(tl.sum(sums, 0), grad_gate.dtype.element_ty), mask=places < size)


def add_plan(x: Tensor, plan: Tensor, segment_ids: Tensor, gate: Tensor | None) -> Tensor:
    """`planlm.kernels.add_plan` for checked arguments.

    Args:
        x (Tensor): `[T, D]`.
        plan (Tensor): `[S, D]`.
        segment_ids (Tensor): int64 `[T]`.
        gate (Tensor | None): `[D]`.

    Returns:
        Tensor: `[T, D]`, contiguous, in x's dtype.
    """
    num_tokens, size = x.shape
    x, plan, segment_ids = with_unit_columns(x), with_unit_columns(plan), segment_ids.contiguous()
    gate = None if gate is None else gate.contiguous()
    out = torch.empty(num_tokens, size, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out

    def run(tiles: Tiles) -> None:
        launch(
            add_plan_fwd_kernel,
            (triton.cdiv(num_tokens, tiles.rows), triton.cdiv(size, tiles.columns)),
            tiles,
            reads=(x, plan, segment_ids, gate),
            writes=(out,),
            x=x, plan=plan, segment_ids=segment_ids, gate=gate, out=out, num_tokens=num_tokens, size=size,
            x_stride=x.stride(0), plan_stride=plan.stride(0),
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
    needs_plan, wants_gate = needs[0], needs[1] and gate is not None
    num_parts = triton.cdiv(num_segments, _SEGMENTS)
    like = partial(torch.empty, device=plan.device)
    if into is not None:
        grad_plan = into
    else:
        grad_plan = like(num_segments, size, dtype=plan.dtype) if needs_plan else plan.new_empty(0)
    grad_gate = like(size, dtype=gate.dtype) if wants_gate and gate is not None else plan.new_empty(0)
    if num_segments == 0 or size == 0 or not (needs_plan or wants_gate):
        return grad_plan, grad_gate.zero_()
    grad, segment_ids = with_unit_columns(grad), segment_ids.contiguous()
    if wants_gate:  # else the plan is only asked for its shape: it need not have values
        plan = with_unit_columns(plan)
    factors = None if gate is None else gate.contiguous()
    gate_parts = like(num_parts, size, dtype=torch.float32) if wants_gate else None

    def run(tiles: Tiles) -> None:
        launch(
            add_plan_bwd_kernel,
            (num_parts, triton.cdiv(size, tiles.columns)),
            tiles,
            reads=(grad, plan if wants_gate else None, segment_ids, factors),
            writes=(grad_plan, gate_parts),
            grad=grad, plan=plan, segment_ids=segment_ids, gate=factors, grad_plan=grad_plan if needs_plan else None,
            gate_parts=gate_parts, num_tokens=grad.shape[0], num_segments=num_segments, size=size,
            grad_stride=grad.stride(0), plan_stride=plan.stride(0),
            grad_plan_stride=grad_plan.stride(0) if needs_plan else size, SEGMENTS=_SEGMENTS,
        )  # fmt: skip

    run(choose_tiles("add_plan_bwd", (size,), grad, plan, trial=run))
    if gate_parts is not None:
        tiles = choose_tiles("gate_bwd", (size,), grad)
        launch(
            gate_bwd_kernel,
            (triton.cdiv(size, tiles.columns),),
            tiles,
            reads=(gate_parts,),
            writes=(grad_gate,),
            gate_parts=gate_parts, grad_gate=grad_gate, num_parts=num_parts, size=size,
        )  # fmt: skip
    return grad_plan, grad_gate
