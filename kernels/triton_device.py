"""What Triton kernels share: loads, stores, products and rounding, and the scores of the actions.

Triton's interpreter takes the bits of a bfloat16 for an integer in products, and cuts a float32 off where a GPU rounds
it to the nearest bfloat16. What stands in for that here costs compiled code nothing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import triton_launch
from .operators import Statistic

INTERPRETED = tl.constexpr(triton_launch.INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)
_PRECISION = tl.constexpr("ieee" if triton_launch.INTERPRETED else "bf16x6")
"""Of float32 products; the interpreter knows no other that is as exact."""
HALF_SCALE = tl.constexpr(16384.0)
"""float16 ends at 6e-8 and a probability among 262,144 actions is 4e-6: as products' operands they are 2^14 larger."""

SCORE_MAX, SCORE_LOG_SUM, LOGIT_MAX, LOGIT_LOG_SUM, THRESHOLD = (tl.constexpr(int(row)) for row in Statistic)


@triton.jit
def exponential(values, scale):
    """`exp(values * scale)` with one multiplication an element: the hardware has powers of two only."""
    return tl.exp2(values * (scale * LOG2_E))


@triton.jit
def add_product(left, right, total):
    """`total + left @ right`, summed in float32; of float32 operands as six products of bfloat16 parts."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=_PRECISION)


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
    at = matrix.data + index.to(tl.int64)[:, None] * matrix.stride + columns[None, :]
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


class Scores(NamedTuple):
    """Where kernels find the scores of the actions from `first_action` on; logits and noise are matrices."""

    logits: Any
    head_bias: Any
    noise: Any
    statistics: Any
    tie_index: Any
    first_action: Any
    top_k: Any


class Oracle(NamedTuple):
    """The oracle's actions and their weights, of each sentence."""

    action: Any
    weight: Any


@triton.jit
def load_scores(source, sentences, actions):
    """Raw logits and scores of a tile, float32; -inf outside the matrix and, in scores, outside the top k.

    `sentences` and `actions` broadcast against each other, so that either may be the tile's first dimension.
    """
    logits = source.logits
    inside = (sentences < logits.num_rows) & (actions < logits.num_columns)
    at = logits.data + sentences.to(tl.int64) * logits.stride + actions
    raw = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
    if source.head_bias is not None:
        raw += load_vector(source.head_bias, actions, logits.num_columns).to(tl.float32)
    scores = raw
    if source.noise.data is not None:
        scores += load_tile(source.noise, sentences, actions).to(tl.float32)
    if source.top_k:
        threshold = load_statistic(source, THRESHOLD, sentences)
        last = load_vector(source.tie_index, sentences, logits.num_rows)
        kept = (scores > threshold) | ((scores == threshold) & (source.first_action + actions <= last))
        scores = tl.where(kept, scores, -float("inf"))
    return raw, scores


@triton.jit
def load_statistic(source, row: tl.constexpr, sentences):
    """A row of the statistics at some sentences."""
    num_sentences = source.logits.num_rows
    return load_vector(source.statistics + row * num_sentences, sentences, num_sentences)


@triton.jit
def load_probabilities(source, sentences, actions, inverse_temperature):
    """Raw logits and probabilities of a tile, as `load_scores`."""
    raw, scores = load_scores(source, sentences, actions)
    scores -= load_statistic(source, SCORE_MAX, sentences)
    return raw, exponential(scores, inverse_temperature) * tl.exp(-load_statistic(source, SCORE_LOG_SUM, sentences))


@triton.jit
def load_oracle(oracle, sentences, num_sentences):
    """Oracle action and its weight; -1 and 0 in sentences without one."""
    action = tl.full(sentences.shape, -1, tl.int64)
    weight = tl.zeros(sentences.shape, tl.float32)
    if oracle.action is not None:
        action = tl.load(oracle.action + sentences, mask=sentences < num_sentences, other=-1)
        if oracle.weight is not None:
            weight = tl.load(oracle.weight + sentences, mask=action >= 0, other=0.0).to(tl.float32)
    return action, weight


@triton.jit
def add_exp_sum(peak, exp_sum, other_peak, other_sum, inverse_temperature):
    """Two sums of exponentials, each relative to its own peak, as one. Nothing seen yet: peak -inf, sum 0."""
    top = tl.maximum(peak, other_peak)
    shift = tl.where(top == -float("inf"), 0.0, top)
    kept = exponential(peak - shift, inverse_temperature)
    added = exponential(other_peak - shift, inverse_temperature)
    return top, exp_sum * kept + other_sum * added
