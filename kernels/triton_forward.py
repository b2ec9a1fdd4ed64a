"""Device code of `plan_projection`: the forward kernels. `triton_projection` launches them and those of the backward.

    scores = logits + head_bias + noise, less all but the top k; p = softmax(scores / temperature)
    mixture_fwd:     online softmax over a range of actions: its largest score, its sum, its mean of the codebook
    combine_fwd:     the ranges weighed together, where there are several
    projection_fwd:  (share w of the oracle's row and 1 - w of the mixture) weight^T + bias; statistics of the rows
    projection_bwd:  gradients of mixture, weight and bias
    mixture_bwd:     gradients of logits, noise and codebook

Two gradients that read the same tensors share a launch: program ids choose the role. Probabilities exist in registers
only; they are computed anew from logits and statistics. A score's distance from the largest comes first and everything
else after, since logits of 1e4 are 1e-3 apart in float32 and their differences exact. For the same reason the largest
score and the logarithm of the sum are kept apart.

Sizes: S sentences, K actions, A action-embedding size, D plan size. In a kernel ROWS and COLUMNS are those of the tile
that a program writes and DEPTH what each step of its loop sums over. Optional tensors are None at compile time.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from .triton_numerics import add_product, exponential, rounded

PARTS = tl.constexpr(6)
"""Rows of `parts`: largest score, sum, largest logit, sum of those, the oracle's logit, index of the largest score
(exact in float32 below 2^24)."""
HALF_SCALE = tl.constexpr(16384.0)
"""float16 ends at 6e-8 and a probability among 262,144 actions is 4e-6: as products' operands they are 2^14 larger."""


@triton.jit
def load_scores(
    logits, head_bias, noise, statistics, cut, rows, columns, logits_stride, noise_stride, num_rows, num_columns,
    first_column, TOP_K: tl.constexpr,
):  # fmt: skip
    """Raw logits and scores of a tile, float32; -inf outside the matrix and, in scores, outside the top k.

    `rows` and `columns` broadcast against each other, so that either may be the tile's first dimension.
    """
    inside = (rows < num_rows) & (columns < num_columns)
    wide = rows.to(tl.int64)
    raw = tl.load(logits + wide * logits_stride + columns, mask=inside, other=-float("inf")).to(tl.float32)
    if head_bias is not None:
        raw += tl.load(head_bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    scores = raw
    if noise is not None:
        scores += tl.load(noise + wide * noise_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if TOP_K:
        threshold = tl.load(statistics + 4 * num_rows + rows, mask=rows < num_rows, other=0.0)
        last = tl.load(cut + rows, mask=rows < num_rows, other=0)
        kept = (scores > threshold) | ((scores == threshold) & (first_column + columns <= last))
        scores = tl.where(kept, scores, -float("inf"))
    return raw, scores


@triton.jit
def load_oracle(oracle, oracle_weight, rows, num_rows):
    """Oracle action and its share; -1 and 0 on rows without one."""
    label = tl.full(rows.shape, -1, tl.int64)
    share = tl.zeros(rows.shape, tl.float32)
    if oracle is not None:
        label = tl.load(oracle + rows, mask=rows < num_rows, other=-1)
        if oracle_weight is not None:
            share = tl.load(oracle_weight + rows, mask=label >= 0, other=0.0).to(tl.float32)
    return label, share


@triton.jit
def load_mixed(
    mixture, codebook, oracle, oracle_weight, rows, places, codebook_stride, num_rows, size
):  # fmt: skip
    """The mixture with the oracle's share in it, rows by places of A."""
    inside = (rows < num_rows)[:, None] & (places < size)[None, :]
    mixed = tl.load(mixture + rows.to(tl.int64)[:, None] * size + places[None, :], mask=inside, other=0.0)
    if oracle_weight is not None:
        label, share = load_oracle(oracle, oracle_weight, rows, num_rows)
        at = codebook + label[:, None] * codebook_stride + places[None, :]
        chosen = tl.load(at, mask=inside & (label >= 0)[:, None], other=0.0).to(tl.float32)
        mixed = (1.0 - share)[:, None] * mixed + share[:, None] * chosen
    return mixed


@triton.jit
def _add_mass(peak, total, other_peak, other_total, inverse_temperature):
    # Two sums of exponentials, each relative to its own peak, as one. Nothing seen yet: peak -inf, total 0.
    top = tl.maximum(peak, other_peak)
    shift = tl.where(top == -float("inf"), 0.0, top)
    kept = exponential(peak - shift, inverse_temperature)
    added = exponential(other_peak - shift, inverse_temperature)
    return top, total * kept + other_total * added


@triton.jit
def mixture_fwd_kernel(
    logits, head_bias, noise, statistics, cut, oracle, codebook, partial, earlier, parts,
    num_rows, num_columns, size, first_column, columns_per_split, inverse_temperature,
    logits_stride, noise_stride, codebook_stride,
    TOP_K: tl.constexpr, RAW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Mean action embedding and statistics of some rows over one range of actions.

    Grid: tiles of A, tiles of S, ranges of K. Writes `partial [ranges, S, A]` and `parts [ranges, PARTS, S]`; given
    `earlier`, the parts of the actions before, goes on from those and from the means that stand in `partial`. `parts`
    must be another tensor: tiles of A other than the first still read when that one writes. With RAW keeps statistics
    of the logits beside those of the scores.
    """
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    places = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.program_id(2) * columns_per_split
    end = tl.minimum(start + columns_per_split, num_columns)
    offsets = tl.program_id(2) * PARTS * num_rows + rows
    peak, total, raw_peak, raw_total, best = _first_state(earlier, offsets, rows, num_rows)
    if codebook is not None:
        scale: tl.constexpr = HALF_SCALE if codebook.dtype.element_ty == tl.float16 else 1.0
        partial += (tl.program_id(2) * num_rows + rows.to(tl.int64))[:, None] * size + places[None, :]
        written = (rows < num_rows)[:, None] & (places < size)[None, :]
        mean = tl.zeros((ROWS, COLUMNS), tl.float32)
        if earlier is not None:
            mean = tl.load(partial, mask=written, other=0.0) * (total * scale)[:, None]
    for column in range(start, end, DEPTH):
        columns = column + tl.arange(0, DEPTH)
        raw, scores = load_scores(
            logits, head_bias, noise, statistics, cut, rows[:, None], columns[None, :], logits_stride, noise_stride,
            num_rows, end, first_column, TOP_K,
        )  # fmt: skip
        highest = tl.max(scores, 1)
        at = tl.min(tl.where(scores == highest[:, None], columns[None, :], num_columns), 1)
        best = tl.where(highest > peak, (first_column + at).to(tl.float32), best)
        top = tl.maximum(peak, highest)
        shift = tl.where(top == -float("inf"), 0.0, top)
        faded = exponential(peak - shift, inverse_temperature)
        mass = exponential(scores - shift[:, None], inverse_temperature)
        total, peak = total * faded + tl.sum(mass, 1), top
        if RAW:
            raw_highest = tl.max(raw, 1)
            raw_mass = exponential(raw - tl.where(raw_highest == -float("inf"), 0.0, raw_highest)[:, None], 1.0)
            raw_peak, raw_total = _add_mass(raw_peak, raw_total, raw_highest, tl.sum(raw_mass, 1), 1.0)
        if codebook is not None:
            inside = (columns < end)[:, None] & (places < size)[None, :]
            at_actions = codebook + columns.to(tl.int64)[:, None] * codebook_stride + places[None, :]
            actions = tl.load(at_actions, mask=inside, other=0.0)
            weights = rounded(mass * scale, actions.dtype)
            mean = add_product(weights, actions, mean * faded[:, None])
    if codebook is not None:
        tl.store(partial, mean / tl.where(total == 0, 1.0, total * scale)[:, None], mask=written)
    if tl.program_id(0) == 0:
        state = (peak, total, raw_peak, raw_total, best)
        _store_state(
            state, earlier, parts, offsets, logits, head_bias, oracle, rows, start, end, logits_stride, num_rows,
            first_column,
        )  # fmt: skip


@triton.jit
def _first_state(earlier, offsets, rows, num_rows):
    zeros = tl.zeros(rows.shape, tl.float32)
    peak, total, raw_peak, raw_total, best = zeros - float("inf"), zeros, zeros - float("inf"), zeros, zeros
    if earlier is not None:
        inside = rows < num_rows
        peak = tl.load(earlier + offsets, mask=inside, other=-float("inf"))
        total = tl.load(earlier + offsets + num_rows, mask=inside, other=0.0)
        raw_peak = tl.load(earlier + offsets + 2 * num_rows, mask=inside, other=-float("inf"))
        raw_total = tl.load(earlier + offsets + 3 * num_rows, mask=inside, other=0.0)
        best = tl.load(earlier + offsets + 5 * num_rows, mask=inside, other=0.0)
    return peak, total, raw_peak, raw_total, best


@triton.jit
def _store_state(
    state, earlier, parts, offsets, logits, head_bias, oracle, rows, start, end, logits_stride, num_rows, first_column
):  # fmt: skip
    peak, total, raw_peak, raw_total, best = state
    inside = rows < num_rows
    parts += offsets
    tl.store(parts, peak, mask=inside)
    tl.store(parts + num_rows, total, mask=inside)
    tl.store(parts + 2 * num_rows, raw_peak, mask=inside)
    tl.store(parts + 3 * num_rows, raw_total, mask=inside)
    tl.store(parts + 5 * num_rows, best, mask=inside)
    if oracle is not None:
        label, _ = load_oracle(oracle, None, rows, num_rows)
        column = label - first_column
        here = inside & (column >= start) & (column < end)
        picked = tl.load(logits + rows.to(tl.int64) * logits_stride + column, mask=here, other=0.0).to(tl.float32)
        if head_bias is not None:
            picked += tl.load(head_bias + column, mask=here, other=0.0).to(tl.float32)
        if earlier is not None:  # 0 unless it was there, and then 0 now
            picked += tl.load(earlier + offsets + 4 * num_rows, mask=inside, other=0.0)
        tl.store(parts + 4 * num_rows, picked, mask=inside)


@triton.jit
def _sum_parts(parts, rows, num_rows, num_splits, inverse_temperature):
    # Peak and sum over all ranges; `parts` stands at the row of peaks, before that of sums.
    peak = tl.full(rows.shape, -float("inf"), tl.float32)
    total = tl.zeros(rows.shape, tl.float32)
    for split in range(num_splits):
        at = parts + split * PARTS * num_rows + rows
        other_peak = tl.load(at, mask=rows < num_rows, other=0.0)
        other_total = tl.load(at + num_rows, mask=rows < num_rows, other=0.0)
        peak, total = _add_mass(peak, total, other_peak, other_total, inverse_temperature)
    return peak, total


@triton.jit
def combine_fwd_kernel(
    partial, parts, mixture, num_rows, size, num_splits, inverse_temperature,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`mixture [S, A]` from the means over each range of actions. Grid: tiles of A, tiles of S."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    places = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (places < size)[None, :]
    peak, total = _sum_parts(parts, rows, num_rows, num_splits, inverse_temperature)
    shift = tl.where(peak == -float("inf"), 0.0, peak)
    mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    for split in range(num_splits):
        at = parts + split * PARTS * num_rows + rows
        range_peak = tl.load(at, mask=rows < num_rows, other=0.0)
        range_total = tl.load(at + num_rows, mask=rows < num_rows, other=0.0)
        share = range_total * exponential(range_peak - shift, inverse_temperature) / tl.where(total == 0, 1.0, total)
        offsets = (split * num_rows + rows.to(tl.int64))[:, None] * size + places[None, :]
        mean += share[:, None] * tl.load(partial + offsets, mask=inside, other=0.0)
    tl.store(mixture + rows.to(tl.int64)[:, None] * size + places[None, :], mean, mask=inside)


@triton.jit
def _store_statistics(
    parts, statistics, cut, log_normalizer, oracle_nll, best, oracle, rows, num_rows, num_columns, num_splits,
    inverse_temperature, TOP_K: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    inside = rows < num_rows
    peak, total = _sum_parts(parts, rows, num_rows, num_splits, inverse_temperature)
    raw_peak, raw_total = peak, total
    if RAW:
        raw_peak, raw_total = _sum_parts(parts + 2 * num_rows, rows, num_rows, num_splits, 1.0)
    picked = tl.zeros(rows.shape, tl.float32)
    highest, at_highest = picked - float("inf"), picked
    for split in range(num_splits):
        at = parts + split * PARTS * num_rows + rows
        range_peak = tl.load(at, mask=inside, other=0.0)
        index = tl.load(at + 5 * num_rows, mask=inside, other=0.0)
        at_highest = tl.where(range_peak > highest, index, at_highest)
        highest = tl.maximum(highest, range_peak)
        if oracle is not None:
            picked += tl.load(at + 4 * num_rows, mask=inside, other=0.0)
    log_total, raw_log_total = tl.log(tl.where(inside, total, 1.0)), tl.log(tl.where(inside, raw_total, 1.0))
    statistics += rows
    tl.store(statistics, peak, mask=inside)
    tl.store(statistics + num_rows, log_total, mask=inside)
    tl.store(statistics + 2 * num_rows, raw_peak, mask=inside)
    tl.store(statistics + 3 * num_rows, raw_log_total, mask=inside)
    if not TOP_K:
        tl.store(statistics + 4 * num_rows, tl.full(rows.shape, -float("inf"), tl.float32), mask=inside)
        tl.store(cut + rows, tl.zeros(rows.shape, tl.int64) + (num_columns - 1), mask=inside)
    tl.store(log_normalizer + rows, peak * inverse_temperature + log_total, mask=inside)
    tl.store(best + rows, at_highest.to(tl.int64), mask=inside)
    nll = tl.zeros(rows.shape, tl.float32)
    if oracle is not None:
        label, _ = load_oracle(oracle, None, rows, num_rows)
        nll = tl.where(label >= 0, (raw_peak - picked) + raw_log_total, 0.0)
    tl.store(oracle_nll + rows, nll, mask=inside)


@triton.jit
def projection_fwd_kernel(
    parts, mixture, codebook, weight, bias, oracle, oracle_weight,
    projected, statistics, cut, log_normalizer, oracle_nll, best,
    num_rows, num_columns, size, plan_size, num_splits, inverse_temperature, codebook_stride, weight_stride,
    TOP_K: tl.constexpr, RAW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Mixture with the oracle's share times weight^T plus bias; the first tile of D finishes the statistics.

    Grid: tiles of D, tiles of S. Without weight the mixture itself is projected (D = A), without codebook nothing is.
    """
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if codebook is not None:
        if weight is None:
            result = load_mixed(
                mixture, codebook, oracle, oracle_weight, rows, columns, codebook_stride, num_rows, size
            )
        else:
            result = tl.zeros((ROWS, COLUMNS), tl.float32)
            for place in range(0, size, DEPTH):
                places = place + tl.arange(0, DEPTH)
                mixed = load_mixed(
                    mixture, codebook, oracle, oracle_weight, rows, places, codebook_stride, num_rows, size
                )
                inside = (places < size)[:, None] & (columns < plan_size)[None, :]
                at = weight + columns.to(tl.int64)[None, :] * weight_stride + places[:, None]
                factors = tl.load(at, mask=inside, other=0.0)
                result = add_product(rounded(mixed, factors.dtype), factors, result)
        if bias is not None:
            result += tl.load(bias + columns, mask=columns < plan_size, other=0.0).to(tl.float32)[None, :]
        written = (rows < num_rows)[:, None] & (columns < plan_size)[None, :]
        result = rounded(result, projected.dtype.element_ty)
        tl.store(projected + rows.to(tl.int64)[:, None] * plan_size + columns[None, :], result, mask=written)
    if tl.program_id(0) == 0:
        _store_statistics(
            parts, statistics, cut, log_normalizer, oracle_nll, best, oracle, rows, num_rows, num_columns, num_splits,
            inverse_temperature, TOP_K, RAW,
        )  # fmt: skip
