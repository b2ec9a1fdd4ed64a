"""Products and rounding in Triton kernels, the same compiled and interpreted.

Triton's interpreter takes the bits of a bfloat16 for an integer in products, and cuts a float32 off where a GPU rounds
it to the nearest bfloat16. What stands in for that here costs compiled code nothing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

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
