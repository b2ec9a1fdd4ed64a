"""Device code of `plan_projection` on CUDA, streamed: no `[S, K]` but the logits. `triton_streamed` launches it.

    mixture_fwd:   online softmax over a split of the actions: its largest score, its sum, its mean of the codebook
    combine_fwd:   the splits weighed together; the mixture with the oracle's embedding in it; statistics
    sentences_bwd: of each sentence the products of grad_mixture, dM, with the mixture, with the likeliest action's
                   embedding less the mixture (0 where that action has all of the probability: the mixture, of bfloat16
                   parts, is its embedding but for 1e-7) and with the oracle's less the mixture
    logits_bwd:    grad_scores = p ((1 - w) (dM codebook^T - dM . mixture) + grad_log_normalizer) / temperature, of the
                   likeliest action with dM . (its embedding - mixture): where it has nearly all of the probability the
                   difference of the two products, numbers in the thousands, would be their rounding
                   grad_logits = grad_scores + grad_oracle_nll (softmax(logits) - one-hot oracle)
    codebook_bwd:  grad_codebook = ((1 - w) p + w one-hot oracle)^T dM

Probabilities exist in registers only; they are computed anew from logits and statistics. A score's distance from the
largest comes first and everything else after, since logits of 1e4 are 1e-3 apart in float32 and their differences
exact. For the same reason the largest score and the logarithm of the sum are kept apart.

Sizes: S sentences, K actions, A action-embedding size (features). In a kernel ROWS and COLUMNS are those of the tile
that a program writes and DEPTH what each step of its loop sums over. Optional tensors are None at compile time.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from .triton_device import (
    HALF_SCALE,
    LOGIT_LOG_SUM,
    LOGIT_MAX,
    SCORE_LOG_SUM,
    SCORE_MAX,
    THRESHOLD,
    Matrix,
    Oracle,
    Scores,
    add_exp_sum,
    add_product,
    exponential,
    load_oracle,
    load_probabilities,
    load_rows,
    load_scores,
    load_statistic,
    load_tile,
    load_vector,
    rounded,
    store_tile,
)

# The partial statistics of a split of the actions have the sums themselves, and no threshold.
SCORE_SUM, LOGIT_SUM, ORACLE_LOGIT, BEST, NUM_PARTIALS = (tl.constexpr(row) for row in (1, 3, 4, 5, 6))


@triton.jit
def mixture_fwd_kernel(
    logits, head_bias, noise, statistics, tie_index, oracle, codebook, earlier, out_means, out_partials,
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
        means = out_means + (tl.program_id(2) * num_sentences + sentences.to(tl.int64))[:, None] * size
        means += features[None, :]
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
            raw_peak, raw_sum = add_exp_sum(raw_peak, raw_sum, raw_highest, tile_sum, 1.0)
        if codebook.data is not None:
            embeddings = load_tile(codebook, actions[:, None], features[None, :])
            mean = add_product(rounded(exponentials * scale, embeddings.dtype), embeddings, mean * rescale[:, None])
    if codebook.data is not None:
        tl.store(means, mean / tl.where(exp_sum == 0, 1.0, exp_sum * scale)[:, None], mask=written)
    if tl.program_id(0) == 0:
        inside = sentences < num_sentences
        to = out_partials + offsets
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
        peak, exp_sum = add_exp_sum(peak, exp_sum, split_peak, split_sum, inverse_temperature)
    return peak, exp_sum


@triton.jit
def combine_fwd_kernel(
    means, partials, codebook, oracle, oracle_weight,
    out_mixture, out_mixed, out_statistics, out_tie_index, out_log_normalizer, out_oracle_nll, out_best,
    num_sentences, num_actions, size, num_splits, inverse_temperature, codebook_stride,
    TOP_K: tl.constexpr, RAW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mixture, float32, and with the oracle's embedding in the products' dtype; the first tile of A has statistics.

    Grid: tiles of A, tiles of S.
    """
    sentences = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (sentences < num_sentences)[:, None] & (features < size)[None, :]
    peak, exp_sum = _sum_splits(partials, SCORE_MAX, sentences, num_sentences, num_splits, inverse_temperature)
    if codebook is not None:
        shift = tl.where(peak == -float("inf"), 0.0, peak)
        mean = tl.zeros((ROWS, COLUMNS), tl.float32)
        for split in range(num_splits):
            split_peak = _load_partial(partials, split, SCORE_MAX, sentences, num_sentences)
            weight = _load_partial(partials, split, SCORE_SUM, sentences, num_sentences)
            weight *= exponential(split_peak - shift, inverse_temperature) / tl.where(exp_sum == 0, 1.0, exp_sum)
            offsets = (split * num_sentences + sentences.to(tl.int64))[:, None] * size + features[None, :]
            mean += weight[:, None] * tl.load(means + offsets, mask=inside, other=0.0)
        store_tile(mean, Matrix(out_mixture, size, num_sentences, size), sentences[:, None], features[None, :])
        embeddings = Matrix(codebook, codebook_stride, num_actions, size)
        mixed = _mixed(mean, embeddings, Oracle(oracle, oracle_weight), sentences, features, num_sentences)
        store_tile(mixed, Matrix(out_mixed, size, num_sentences, size), sentences[:, None], features[None, :])
    if tl.program_id(0) == 0:
        _store_statistics(
            partials, out_statistics, out_tie_index, out_log_normalizer, out_oracle_nll, out_best, oracle, sentences,
            num_sentences, num_actions, num_splits, inverse_temperature, peak, exp_sum, TOP_K, RAW,
        )  # fmt: skip


@triton.jit
def _mixed(mean, codebook, oracle, sentences, features, num_sentences):
    # The mixture with the oracle's embedding in it.
    if oracle.weight is not None:
        action, weight = load_oracle(oracle, sentences, num_sentences)
        mean = (1.0 - weight)[:, None] * mean + weight[:, None] * load_rows(codebook, action, features)
    return mean


@triton.jit
def _store_statistics(
    partials, statistics, tie_index, log_normalizer, oracle_nll, best, oracle, sentences, num_sentences, num_actions,
    num_splits, inverse_temperature, peak, exp_sum, TOP_K: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    inside = sentences < num_sentences
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


@triton.jit
def sentences_bwd_kernel(
    grad_mixture, mixture, codebook, oracle, oracle_weight, statistics, best, out_mixed, out_products,
    num_sentences, num_actions, size, grad_mixture_stride, codebook_stride,
    TO_ORACLE_WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`out_products [3, S]`, and the mixture with the oracle's embedding again where its tensor is given. Grid: S."""
    sentences = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = sentences < num_sentences
    codebook = Matrix(codebook, codebook_stride, num_actions, size)
    likeliest = tl.load(best + sentences, mask=inside, other=-1)
    action, _ = load_oracle(Oracle(oracle, None), sentences, num_sentences)
    zeros = tl.zeros((ROWS,), tl.float32)
    of_mixture, of_best, of_oracle = zeros, zeros, zeros
    for feature in range(0, size, COLUMNS):
        features = feature + tl.arange(0, COLUMNS)
        mean = load_tile(Matrix(mixture, size, num_sentences, size), sentences[:, None], features[None, :])
        if grad_mixture is not None:
            upstream = Matrix(grad_mixture, grad_mixture_stride, num_sentences, size)
            gradient = load_tile(upstream, sentences[:, None], features[None, :]).to(tl.float32)
            of_mixture += tl.sum(gradient * mean, 1)
            of_best += tl.sum(gradient * (load_rows(codebook, likeliest, features) - mean), 1)
            if TO_ORACLE_WEIGHT:
                of_oracle += tl.sum(gradient * (load_rows(codebook, action, features) - mean), 1)
        if out_mixed is not None:
            mixed = _mixed(mean, codebook, Oracle(oracle, oracle_weight), sentences, features, num_sentences)
            store_tile(mixed, Matrix(out_mixed, size, num_sentences, size), sentences[:, None], features[None, :])
    log_sum = tl.load(statistics + SCORE_LOG_SUM * num_sentences + sentences, mask=inside, other=0.0)
    of_best = tl.where(log_sum == 0, 0.0, of_best)
    tl.store(out_products + sentences, of_mixture, mask=inside)
    tl.store(out_products + num_sentences + sentences, of_best, mask=inside)
    tl.store(out_products + 2 * num_sentences + sentences, tl.where(action >= 0, of_oracle, 0.0), mask=inside)


@triton.jit
def logits_bwd_kernel(
    grad_mixture, products, grad_log_normalizer, grad_oracle_nll, logits, head_bias, noise, statistics, tie_index,
    oracle, oracle_weight, best, codebook, out_logits, out_noise,
    num_sentences, num_actions, size, first_action, inverse_temperature, grad_mixture_stride,
    grad_log_normalizer_stride, grad_oracle_nll_stride, logits_stride, noise_stride, codebook_stride,
    out_logits_stride, out_noise_stride,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradients of logits and noise, each where its tensor is given. Grid: tiles of S times tiles of K.

    Tiles are of ROWS by DEPTH, like the scores' elsewhere: everything at the end is elementwise and in registers.
    """
    tiles = tl.cdiv(num_actions, DEPTH)
    sentences = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    actions = tl.program_id(0) % tiles * DEPTH + tl.arange(0, DEPTH)
    logits = Matrix(logits, logits_stride, num_sentences, num_actions)
    noise = Matrix(noise, noise_stride, num_sentences, num_actions)
    source = Scores(logits, head_bias, noise, statistics, tie_index, first_action, TOP_K)
    label, weight = load_oracle(Oracle(oracle, oracle_weight), sentences, num_sentences)
    inside = sentences < num_sentences
    gradient = tl.zeros((ROWS, DEPTH), tl.float32)
    if grad_mixture is not None:
        upstream = Matrix(grad_mixture, grad_mixture_stride, num_sentences, size)
        embeddings = Matrix(codebook, codebook_stride, num_actions, size)
        for feature in range(0, size, COLUMNS):
            features = feature + tl.arange(0, COLUMNS)
            of_mixture = load_tile(upstream, sentences[:, None], features[None, :])
            embedding = load_tile(embeddings, actions[None, :], features[:, None])
            gradient = add_product(of_mixture, embedding, gradient)
        mean = load_vector(products, sentences, num_sentences)
        of_best = load_vector(products + num_sentences, sentences, num_sentences)
        likeliest = tl.load(best + sentences, mask=inside, other=-1)
        is_best = first_action + actions[None, :] == likeliest[:, None]
        gradient = tl.where(is_best, of_best[:, None], gradient - mean[:, None]) * (1.0 - weight)[:, None]
    if grad_log_normalizer is not None:
        at = grad_log_normalizer + sentences.to(tl.int64) * grad_log_normalizer_stride
        gradient += tl.load(at, mask=inside, other=0.0).to(tl.float32)[:, None]
    raw, probabilities = load_probabilities(source, sentences[:, None], actions[None, :], inverse_temperature)
    gradient = probabilities * gradient * inverse_temperature
    if out_noise is not None:
        to_noise = Matrix(out_noise, out_noise_stride, num_sentences, num_actions)
        store_tile(gradient, to_noise, sentences[:, None], actions[None, :])
    if out_logits is not None:
        if grad_oracle_nll is not None:
            at = grad_oracle_nll + sentences.to(tl.int64) * grad_oracle_nll_stride
            grad_nll = tl.load(at, mask=inside & (label >= 0), other=0.0).to(tl.float32)
            raw -= load_statistic(source, LOGIT_MAX, sentences)[:, None]
            raw_log_sum = load_statistic(source, LOGIT_LOG_SUM, sentences)
            likelihood = exponential(raw, 1.0) * tl.exp(-raw_log_sum)[:, None]
            hit = label[:, None] == first_action + actions[None, :]
            gradient += grad_nll[:, None] * (likelihood - tl.where(hit, 1.0, 0.0))
        to_logits = Matrix(out_logits, out_logits_stride, num_sentences, num_actions)
        store_tile(gradient, to_logits, sentences[:, None], actions[None, :])


@triton.jit
def codebook_bwd_kernel(
    grad_mixture, logits, head_bias, noise, statistics, tie_index, oracle, oracle_weight, out_codebook,
    num_sentences, num_actions, size, first_action, inverse_temperature,
    grad_mixture_stride, logits_stride, noise_stride, out_codebook_stride,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradient of the codebook. Grid: tiles of A, tiles of K: those that read the same logits stand side by side."""
    actions = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    logits = Matrix(logits, logits_stride, num_sentences, num_actions)
    noise = Matrix(noise, noise_stride, num_sentences, num_actions)
    source = Scores(logits, head_bias, noise, statistics, tie_index, first_action, TOP_K)
    upstream = Matrix(grad_mixture, grad_mixture_stride, num_sentences, size)
    scale: tl.constexpr = HALF_SCALE if grad_mixture.dtype.element_ty == tl.float16 else 1.0
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for sentence in range(0, num_sentences, DEPTH):
        sentences = sentence + tl.arange(0, DEPTH)
        _, weights = load_probabilities(source, sentences[None, :], actions[:, None], inverse_temperature)
        if oracle_weight is not None:
            label, weight = load_oracle(Oracle(oracle, oracle_weight), sentences, num_sentences)
            hit = label[None, :] == first_action + actions[:, None]
            weights = (1.0 - weight)[None, :] * weights + tl.where(hit, weight[None, :], 0.0)
        gradient = load_tile(upstream, sentences[:, None], features[None, :])
        result = add_product(rounded(weights * scale, gradient.dtype), gradient, result)
    to = Matrix(out_codebook, out_codebook_stride, num_actions, size)
    store_tile(result / scale, to, actions[:, None], features[None, :])
