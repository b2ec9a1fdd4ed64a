"""Loads, stores, products and rounding in Triton kernels, the same compiled and interpreted.

Triton's interpreter takes the bits of a bfloat16 for an integer in products, and cuts a float32 off where a GPU rounds
it to the nearest bfloat16. What stands in for that here costs compiled code nothing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import triton_tiles

INTERPRETED = tl.constexpr(triton_tiles.INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exponential(values, scale):
    """`exp(values * scale)` with one multiplication an element: the hardware has powers of two only."""
    return tl.exp2(values * (scale * LOG2_E))


@triton.jit
def add_product(left, right, total):
    """`total + left @ right`, summed in float32; of float32 operands within 1e-5, as three tf32 products."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="tf32x3")


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 values in another dtype, each the nearest there is (to even)."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)


class Matrix(NamedTuple):
    """A matrix with adjacent columns, as kernels see it; without data it is not given."""

    data: Any
    stride: Any
    num_rows: Any
    num_columns: Any


@triton.jit
def load_tile(matrix, rows, columns):
    """A tile of a matrix, 0 outside. `rows` and `columns` broadcast: either may be the tile's first dimension."""
    inside = (rows < matrix.num_rows) & (columns < matrix.num_columns)
    return tl.load(matrix.data + rows.to(tl.int64) * matrix.stride + columns, mask=inside, other=0)


@triton.jit
def load_rows(matrix, index, columns):
    """The rows of a matrix with these indices in float32; 0 for a negative one."""
    inside = (index >= 0)[:, None] & (columns < matrix.num_columns)[None, :]
    at = matrix.data + index[:, None] * matrix.stride + columns[None, :]
    return tl.load(at, mask=inside, other=0).to(tl.float32)


@triton.jit
def store_tile(values, matrix, rows, columns):
    """Write float32 values where `load_tile` would read them, rounded to the matrix's dtype."""
    inside = (rows < matrix.num_rows) & (columns < matrix.num_columns)
    at = matrix.data + rows.to(tl.int64) * matrix.stride + columns
    tl.store(at, rounded(values, matrix.data.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(vector, at, size):
    """Entries of a vector, 0 outside."""
    return tl.load(vector + at, mask=at < size, other=0)
