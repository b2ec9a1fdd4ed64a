"""`cross_entropy_` on CUDA: a row of logits becomes its own gradient, read twice and written once.

    nll = log(sum_v exp(logits[v])) - logits[target]        gradient[v] = exp(logits[v]) / sum - (v == target)

A program has a row. Each of its lanes keeps the largest logit that it has met and a sum relative to that, so nothing
is exchanged between threads before the end of the first pass. The second pass goes backwards: of a row that does not
stay in the second-level cache, the end still does. Everything is float32, the distance from the largest logit is taken
first, and no sum depends on the order in which programs run.

Sizes: N rows, V columns.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from .triton_device import LOG2_E, exponential, rounded
from .triton_launch import INTERPRETED, Tiles, launch

OPERATORS = ("cross_entropy_",)
"""What this backend implements here; `operators` has the schemas."""

_TILES = Tiles(1, 16) if INTERPRETED else Tiles(1, 8192, num_warps=32)
"""16 bytes of half precision a thread. With 32 registers each, two programs of 1,024 threads fill a multiprocessor;
more and smaller ones would have more rows between them than stay in the second-level cache: two on each of an H100's
have 26 MB of GPT-2's."""

_RAGGED = Tiles(1, 16) if INTERPRETED else Tiles(1, 4096, num_warps=32)
"""Where rows begin anywhere, and every element has an address: with half as many 32 registers still do."""

LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Where a lane begins: finite, since it is subtracted from logits that may be minus infinity."""


@triton.jit
def _included(largest, total, values):
    # A thread takes the largest of its 16 bytes first: one correction of the sum for all of them.
    higher = tl.maximum(largest, tl.max(values, 1))
    total = total * exponential(largest - higher, 1.0) + tl.sum(exponential(values - higher[:, None], 1.0), 1)
    return higher, total


@triton.jit
def _gradient(values, columns, token, largest, log2_sum, dtype: tl.constexpr):
    probability = tl.exp2((values - largest) * LOG2_E - log2_sum)
    return rounded(tl.where(columns == token, probability - 1.0, probability), dtype)


@triton.jit
def cross_entropy_kernel(inout_logits, target, out_nll, size, inout_logits_stride, COLUMNS: tl.constexpr):
    """A row's gradient, where its logits are, and its loss; 0 for a negative target, NaN for one beyond. Grid: N."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = inout_logits.dtype.element_ty
    GROUP: tl.constexpr = 128 // inout_logits.dtype.element_ty.primitive_bitwidth  # 16 bytes
    logits = inout_logits + row * inout_logits_stride
    wanted = tl.load(target + row)
    # Masks are of whole groups, or a V that is no multiple of 16 would have each element loaded by itself.
    groups = tl.arange(0, COLUMNS // GROUP)[:, None] * GROUP
    lanes = groups + tl.arange(0, GROUP)[None, :]
    whole = size // GROUP * GROUP
    edge = whole + tl.arange(0, GROUP)
    if wanted < 0:
        for start in range(0, whole, COLUMNS):
            nothing = tl.zeros((COLUMNS // GROUP, GROUP), dtype)
            tl.store(logits + start + lanes, nothing, mask=start + groups < whole)
        tl.store(logits + edge, tl.zeros((GROUP,), dtype), mask=edge < size)
        tl.store(out_nll + row, 0.0)
    else:
        its_logit = tl.load(logits + wanted, mask=wanted < size, other=float("nan")).to(tl.float32)
        last = tl.load(logits + edge, mask=edge < size, other=float("-inf")).to(tl.float32)
        largest, total = tl.full((COLUMNS // GROUP,), LOWEST, tl.float32), tl.zeros((COLUMNS // GROUP,), tl.float32)
        for start in range(0, whole, COLUMNS):
            inside = start + groups < whole
            values = tl.load(logits + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
            largest, total = _included(largest, total, values)
        maximum = tl.maximum(tl.max(largest, 0), tl.max(last, 0))
        total = tl.sum(total * exponential(largest - maximum, 1.0), 0) + tl.sum(exponential(last - maximum, 1.0), 0)
        log2_sum = tl.where(wanted < size, tl.log2(total), float("nan"))
        tl.store(out_nll + row, (maximum - its_logit) + log2_sum * LN_2)
        token = wanted.to(tl.int32)
        tl.store(logits + edge, _gradient(last, edge, token, maximum, log2_sum, dtype), mask=edge < size)
        num_blocks = tl.cdiv(whole, COLUMNS)
        for block in range(num_blocks):
            start = (num_blocks - 1 - block) * COLUMNS
            inside = start + groups < whole
            values = tl.load(logits + start + lanes, mask=inside, other=0.0).to(tl.float32)
            gradient = _gradient(values, start + lanes, token, maximum, log2_sum, dtype)
            tl.store(logits + start + lanes, gradient, mask=inside)


def cross_entropy_(logits: Tensor, target: Tensor) -> Tensor:
    """`planlm.kernels.cross_entropy_` in place, for rows of adjacent columns that do not overlap; returns the loss."""
    num_rows, size = logits.shape
    if target.shape != (num_rows,):
        raise ValueError(f"target: got shape {tuple(target.shape)}, needs one for each of {num_rows} rows")
    nll, target = logits.new_empty(num_rows, dtype=float32), target.contiguous()
    is_aligned = logits.stride(0) % 16 == 0 and logits.data_ptr() % 16 == 0  # as far as Triton sees
    launch(
        cross_entropy_kernel, (num_rows, 1, 1), _TILES if is_aligned else _RAGGED,
        inout_logits=logits, target=target, out_nll=nll, size=size,
    )  # fmt: skip
    return nll
