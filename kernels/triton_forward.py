"""Device code of `plan_projection`: the forward kernels. `triton_projection` launches them and those of the backward.

    scores = logits + head_bias + noise, less all but the top k; p = softmax(scores / temperature)
    mixture_fwd:     online softmax over a split of the actions: its largest score, its sum, its mean of the codebook
    combine_fwd:     the splits weighed together, where there are several
    projection_fwd:  (w of the oracle's embedding and 1 - w of the mixture) weight^T + bias; statistics
    projection_bwd:  gradients of mixture, weight and bias
    mixture_bwd:     gradients of logits, noise and codebook

Two gradients that read the same tensors share a launch: program ids choose the role. Probabilities exist in registers
only; they are computed anew from logits and statistics. A score's distance from the largest comes first and everything
else after, since logits of 1e4 are 1e-3 apart in float32 and their differences exact. For the same reason the largest
score and the logarithm of the sum are kept apart.

Sizes: S sentences, K actions, A action-embedding size (features), D plan size. In a kernel ROWS and COLUMNS are those
of the tile that a program writes and DEPTH what each step of its loop sums over. Optional tensors are None at compile
time.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .contract import Statistic
from .triton_numerics import Matrix, add_product, exponential, load_rows, load_tile, load_vector, rounded, store_tile

SCORE_MAX, SCORE_LOG_SUM, LOGIT_MAX, LOGIT_LOG_SUM, THRESHOLD = (tl.constexpr(int(row)) for row in Statistic)
# The partial statistics of a split of the actions have the sums themselves, and no threshold.
SCORE_SUM, LOGIT_SUM, ORACLE_LOGIT, BEST, NUM_PARTIALS = (tl.constexpr(row) for row in (1, 3, 4, 5, 6))
HALF_SCALE = tl.constexpr(16384.0)
"""float16 ends at 6e-8 and a probability among 262,144 actions is 4e-6: as products' operands they are 2^14 larger."""


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
def load_mixed(mixture, codebook, oracle, sentences, features):
    """The mixture with the oracle's embedding in it, sentences by features."""
    mixed = load_tile(mixture, sentences[:, None], features[None, :])
    if oracle.weight is not None:
        action, weight = load_oracle(oracle, sentences, mixture.num_rows)
        mixed = (1.0 - weight)[:, None] * mixed + weight[:, None] * load_rows(codebook, action, features)
    return mixed


@triton.jit
def _add_exp_sum(peak, exp_sum, other_peak, other_sum, inverse_temperature):
    # Two sums of exponentials, each relative to its own peak, as one. Nothing seen yet: peak -inf, sum 0.
    top = tl.maximum(peak, other_peak)
    shift = tl.where(top == -float("inf"), 0.0, top)
    kept = exponential(peak - shift, inverse_temperature)
    added = exponential(other_peak - shift, inverse_temperature)
    return top, exp_sum * kept + other_sum * added


@triton.jit
def mixture_fwd_kernel(
    logits, head_bias, noise, statistics, tie_index, oracle, codebook, means, earlier, partials,
    num_sentences, num_actions, size, first_action, actions_per_split, inverse_temperature,
    logits_stride, noise_stride, codebook_stride,
    TOP_K: tl.constexpr, RAW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Mean action embedding and partial statistics of some sentences over one split of the actions.

    Grid: tiles of A, tiles of S, splits of K. Writes `means [splits, S, A]` and `partials [splits, NUM_PARTIALS, S]`;
    given `earlier`, the partial statistics of the actions before, goes on from those and from `means`. `partials`
    must be another tensor: tiles of A other than the first still read when that one writes. With RAW keeps statistics
    of the logits beside those of the scores.
    """
    sentences = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.program_id(2) * actions_per_split
    end = tl.minimum(start + actions_per_split, num_actions)
    logits = Matrix(logits, logits_stride, num_sentences, end)
    noise = Matrix(noise, noise_stride, num_sentences, end)
    codebook = Matrix(codebook, codebook_stride, end, size)
    source = Scores(logits, head_bias, noise, statistics, tie_index, first_action, TOP_K)
    offsets = tl.program_id(2) * NUM_PARTIALS * num_sentences + sentences
    peak, exp_sum, raw_peak, raw_sum, best = _first_state(earlier, offsets, sentences, num_sentences)
    if codebook.data is not None:
        scale: tl.constexpr = HALF_SCALE if codebook.data.dtype.element_ty == tl.float16 else 1.0
        means += (tl.program_id(2) * num_sentences + sentences.to(tl.int64))[:, None] * size + features[None, :]
        written = (sentences < num_sentences)[:, None] & (features < size)[None, :]
        mean = tl.zeros((ROWS, COLUMNS), tl.float32)
        if earlier is not None:
            mean = tl.load(means, mask=written, other=0.0) * (exp_sum * scale)[:, None]
    for action in range(start, end, DEPTH):
        actions = action + tl.arange(0, DEPTH)
        raw, scores = load_scores(source, sentences[:, None], actions[None, :])
        highest = tl.max(scores, 1)
        at = tl.min(tl.where(scores == highest[:, None], actions[None, :], num_actions), 1)
        best = tl.where(highest > peak, (first_action + at).to(tl.float32), best)
        top = tl.maximum(peak, highest)
        shift = tl.where(top == -float("inf"), 0.0, top)
        rescale = exponential(peak - shift, inverse_temperature)
        exponentials = exponential(scores - shift[:, None], inverse_temperature)
        exp_sum, peak = exp_sum * rescale + tl.sum(exponentials, 1), top
        if RAW:
            raw_highest = tl.max(raw, 1)
            raw_shift = tl.where(raw_highest == -float("inf"), 0.0, raw_highest)
            tile_sum = tl.sum(exponential(raw - raw_shift[:, None], 1.0), 1)
            raw_peak, raw_sum = _add_exp_sum(raw_peak, raw_sum, raw_highest, tile_sum, 1.0)
        if codebook.data is not None:
            embeddings = load_tile(codebook, actions[:, None], features[None, :])
            mean = add_product(rounded(exponentials * scale, embeddings.dtype), embeddings, mean * rescale[:, None])
    if codebook.data is not None:
        tl.store(means, mean / tl.where(exp_sum == 0, 1.0, exp_sum * scale)[:, None], mask=written)
    if tl.program_id(0) == 0:
        inside = sentences < num_sentences
        to = partials + offsets
        tl.store(to + SCORE_MAX * num_sentences, peak, mask=inside)
        tl.store(to + SCORE_SUM * num_sentences, exp_sum, mask=inside)
        tl.store(to + LOGIT_MAX * num_sentences, raw_peak, mask=inside)
        tl.store(to + LOGIT_SUM * num_sentences, raw_sum, mask=inside)
        tl.store(to + BEST * num_sentences, best, mask=inside)
        if oracle is not None:
            label, _ = load_oracle(Oracle(oracle, None), sentences, num_sentences)
            picked = _load_label(source, label - first_action, start, sentences)
            if earlier is not None:  # 0 unless it was there, and then 0 now
                picked += tl.load(earlier + offsets + ORACLE_LOGIT * num_sentences, mask=inside, other=0.0)
            tl.store(to + ORACLE_LOGIT * num_sentences, picked, mask=inside)


@triton.jit
def _first_state(earlier, offsets, sentences, num_sentences):
    zeros = tl.zeros(sentences.shape, tl.float32)
    peak, exp_sum, raw_peak, raw_sum, best = zeros - float("inf"), zeros, zeros - float("inf"), zeros, zeros
    if earlier is not None:
        inside = sentences < num_sentences
        earlier += offsets
        peak = tl.load(earlier + SCORE_MAX * num_sentences, mask=inside, other=-float("inf"))
        exp_sum = tl.load(earlier + SCORE_SUM * num_sentences, mask=inside, other=0.0)
        raw_peak = tl.load(earlier + LOGIT_MAX * num_sentences, mask=inside, other=-float("inf"))
        raw_sum = tl.load(earlier + LOGIT_SUM * num_sentences, mask=inside, other=0.0)
        best = tl.load(earlier + BEST * num_sentences, mask=inside, other=0.0)
    return peak, exp_sum, raw_peak, raw_sum, best


@triton.jit
def _load_label(source, action, start, sentences):
    # One logit of each sentence; 0 where its action is not in this split.
    logits = source.logits
    here = (sentences < logits.num_rows) & (action >= start) & (action < logits.num_columns)
    picked = tl.load(logits.data + sentences.to(tl.int64) * logits.stride + action, mask=here, other=0.0).to(tl.float32)
    if source.head_bias is not None:
        picked += tl.load(source.head_bias + action, mask=here, other=0.0).to(tl.float32)
    return picked


@triton.jit
def _load_partial(partials, split, row: tl.constexpr, sentences, num_sentences):
    return load_vector(partials + (split * NUM_PARTIALS + row) * num_sentences, sentences, num_sentences)


@triton.jit
def _sum_splits(partials, row: tl.constexpr, sentences, num_sentences, num_splits, inverse_temperature):
    # Peak and sum of exponentials over all splits, of scores or logits; the sum's row follows the peak's.
    peak = tl.full(sentences.shape, -float("inf"), tl.float32)
    exp_sum = tl.zeros(sentences.shape, tl.float32)
    for split in range(num_splits):
        split_peak = _load_partial(partials, split, row, sentences, num_sentences)
        split_sum = _load_partial(partials, split, row + 1, sentences, num_sentences)
        peak, exp_sum = _add_exp_sum(peak, exp_sum, split_peak, split_sum, inverse_temperature)
    return peak, exp_sum


@triton.jit
def combine_fwd_kernel(
    means, partials, mixture, num_sentences, size, num_splits, inverse_temperature,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`mixture [S, A]` from the means over each split of the actions. Grid: tiles of A, tiles of S."""
    sentences = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (sentences < num_sentences)[:, None] & (features < size)[None, :]
    peak, exp_sum = _sum_splits(partials, SCORE_MAX, sentences, num_sentences, num_splits, inverse_temperature)
    shift = tl.where(peak == -float("inf"), 0.0, peak)
    mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    for split in range(num_splits):
        split_peak = _load_partial(partials, split, SCORE_MAX, sentences, num_sentences)
        split_sum = _load_partial(partials, split, SCORE_SUM, sentences, num_sentences)
        weight = split_sum * exponential(split_peak - shift, inverse_temperature) / tl.where(exp_sum == 0, 1.0, exp_sum)
        offsets = (split * num_sentences + sentences.to(tl.int64))[:, None] * size + features[None, :]
        mean += weight[:, None] * tl.load(means + offsets, mask=inside, other=0.0)
    store_tile(mean, Matrix(mixture, size, num_sentences, size), sentences[:, None], features[None, :])


@triton.jit
def projection_fwd_kernel(
    partials, mixture, codebook, weight, bias, oracle, oracle_weight,
    projected, statistics, tie_index, log_normalizer, oracle_nll, best,
    num_sentences, num_actions, size, plan_size, num_splits, inverse_temperature, codebook_stride, weight_stride,
    TOP_K: tl.constexpr, RAW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Mixture, with the oracle's embedding, times weight^T plus bias; the first tile of D finishes the statistics.

    Grid: tiles of D, tiles of S. Without weight the mixture itself is projected (D = A), without codebook nothing is.
    """
    sentences = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if codebook is not None:
        mixtures = Matrix(mixture, size, num_sentences, size)
        embeddings = Matrix(codebook, codebook_stride, num_actions, size)
        weights = Matrix(weight, weight_stride, plan_size, size)
        labels = Oracle(oracle, oracle_weight)
        if weight is None:
            result = load_mixed(mixtures, embeddings, labels, sentences, columns)
        else:
            result = tl.zeros((ROWS, COLUMNS), tl.float32)
            for feature in range(0, size, DEPTH):
                features = feature + tl.arange(0, DEPTH)
                mixed = load_mixed(mixtures, embeddings, labels, sentences, features)
                factors = load_tile(weights, columns[None, :], features[:, None])
                result = add_product(rounded(mixed, factors.dtype), factors, result)
        if bias is not None:
            result += load_vector(bias, columns, plan_size).to(tl.float32)[None, :]
        output = Matrix(projected, plan_size, num_sentences, plan_size)
        store_tile(result, output, sentences[:, None], columns[None, :])
    if tl.program_id(0) == 0:
        _store_statistics(
            partials, statistics, tie_index, log_normalizer, oracle_nll, best, oracle, sentences, num_sentences,
            num_actions, num_splits, inverse_temperature, TOP_K, RAW,
        )  # fmt: skip


@triton.jit
def _store_statistics(
    partials, statistics, tie_index, log_normalizer, oracle_nll, best, oracle, sentences, num_sentences, num_actions,
    num_splits, inverse_temperature, TOP_K: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    inside = sentences < num_sentences
    peak, exp_sum = _sum_splits(partials, SCORE_MAX, sentences, num_sentences, num_splits, inverse_temperature)
    raw_peak, raw_sum = peak, exp_sum
    if RAW:
        raw_peak, raw_sum = _sum_splits(partials, LOGIT_MAX, sentences, num_sentences, num_splits, 1.0)
    picked = tl.zeros(sentences.shape, tl.float32)
    highest, at_highest = picked - float("inf"), picked
    for split in range(num_splits):
        split_peak = _load_partial(partials, split, SCORE_MAX, sentences, num_sentences)
        split_best = _load_partial(partials, split, BEST, sentences, num_sentences)
        at_highest = tl.where(split_peak > highest, split_best, at_highest)
        highest = tl.maximum(highest, split_peak)
        if oracle is not None:
            picked += _load_partial(partials, split, ORACLE_LOGIT, sentences, num_sentences)
    log_sum, raw_log_sum = tl.log(tl.where(inside, exp_sum, 1.0)), tl.log(tl.where(inside, raw_sum, 1.0))
    statistics += sentences
    tl.store(statistics + SCORE_MAX * num_sentences, peak, mask=inside)
    tl.store(statistics + SCORE_LOG_SUM * num_sentences, log_sum, mask=inside)
    tl.store(statistics + LOGIT_MAX * num_sentences, raw_peak, mask=inside)
    tl.store(statistics + LOGIT_LOG_SUM * num_sentences, raw_log_sum, mask=inside)
    if not TOP_K:
        lowest = tl.full(sentences.shape, -float("inf"), tl.float32)
        tl.store(statistics + THRESHOLD * num_sentences, lowest, mask=inside)
        tl.store(tie_index + sentences, tl.zeros(sentences.shape, tl.int64) + (num_actions - 1), mask=inside)
    tl.store(log_normalizer + sentences, peak * inverse_temperature + log_sum, mask=inside)
    tl.store(best + sentences, at_highest.to(tl.int64), mask=inside)
    nll = tl.zeros(sentences.shape, tl.float32)
    if oracle is not None:
        action, _ = load_oracle(Oracle(oracle, None), sentences, num_sentences)
        nll = tl.where(action >= 0, (raw_peak - picked) + raw_log_sum, 0.0)
    tl.store(oracle_nll + sentences, nll, mask=inside)
