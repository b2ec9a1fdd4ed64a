"""Device code of `plan_projection`: the backward kernels. `triton_forward` has the formulas and what names mean.

dM = grad_projected weight        grad_weight = grad_projected^T mixed        grad_bias = sum_s grad_projected
grad_scores = p ((1 - w) (dM codebook^T - dM . mixture) + grad_log_normalizer) / temperature
    of the likeliest action dM . (its embedding - mixture): where it has nearly all of the probability the difference of
    the two products, numbers in the thousands, would be their rounding
grad_logits = grad_scores + grad_oracle_nll (softmax(logits) - one-hot oracle)
grad_codebook = ((1 - w) p + w one-hot oracle)^T dM
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from .triton_forward import (
    HALF_SCALE,
    LOGIT_LOG_SUM,
    LOGIT_MAX,
    SCORE_LOG_SUM,
    SCORE_MAX,
    Oracle,
    Scores,
    load_mixed,
    load_oracle,
    load_scores,
    load_statistic,
)
from .triton_numerics import Matrix, add_product, exponential, load_rows, load_tile, rounded, store_tile


@triton.jit
def projection_bwd_kernel(
    grad_projected, mixture, codebook, weight, oracle, oracle_weight, best,
    grad_mixture, grad_weight, grad_bias, delta_partials,
    num_sentences, num_actions, size, plan_size, num_partials, grad_projected_stride, codebook_stride, weight_stride,
    TO_ORACLE_WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradients of mixture (with what follows from it for each sentence), weight and bias, where their tensor is given.

    Grid: tiles of `grad_mixture [S, A]`, then of `grad_weight [D, A]`, then of `grad_bias [D]`.
    """
    program = tl.program_id(0)
    mixture_tiles = tl.cdiv(num_sentences, ROWS) * num_partials
    weight_tiles = tl.cdiv(plan_size, ROWS) * tl.cdiv(size, COLUMNS) if grad_weight is not None else 0
    upstream = Matrix(grad_projected, grad_projected_stride, num_sentences, plan_size)
    mixture = Matrix(mixture, size, num_sentences, size)
    codebook = Matrix(codebook, codebook_stride, num_actions, size)
    if program < mixture_tiles:
        _grad_mixture_tile(
            program, upstream, mixture, codebook, Matrix(weight, weight_stride, plan_size, size), oracle, best,
            Matrix(grad_mixture, size, num_sentences, size), delta_partials, num_partials, TO_ORACLE_WEIGHT,
            ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    elif program < mixture_tiles + weight_tiles:
        if grad_weight is not None:
            _grad_weight_tile(
                program - mixture_tiles, upstream, mixture, codebook, Oracle(oracle, oracle_weight),
                Matrix(grad_weight, size, plan_size, size), ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
    elif grad_bias is not None:
        # A role of its own: inside the product's loop the sum would need every tile in registers as well.
        columns = (program - mixture_tiles - weight_tiles) * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros((COLUMNS,), tl.float32)
        for sentence in range(0, num_sentences, DEPTH):
            sentences = sentence + tl.arange(0, DEPTH)
            sums += tl.sum(load_tile(upstream, sentences[:, None], columns[None, :]).to(tl.float32), 0)
        tl.store(grad_bias + columns, rounded(sums, grad_bias.dtype.element_ty), mask=columns < plan_size)


@triton.jit
def _grad_mixture_tile(
    program, upstream, mixture, codebook, weight, oracle, best, grad_mixture, delta_partials, num_partials,
    TO_ORACLE_WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # grad_projected weight; of each sentence its products with the mixture, with the likeliest action's embedding less
    # the mixture and with the oracle's less the mixture.
    sentences = program // num_partials * ROWS + tl.arange(0, ROWS)
    partial = program % num_partials
    features = partial * COLUMNS + tl.arange(0, COLUMNS)
    if weight.data is None:
        gradient = load_tile(upstream, sentences[:, None], features[None, :])
    else:
        result = tl.zeros((ROWS, COLUMNS), tl.float32)
        for column in range(0, upstream.num_columns, DEPTH):
            columns = column + tl.arange(0, DEPTH)
            gradient = load_tile(upstream, sentences[:, None], columns[None, :])
            result = add_product(gradient, load_tile(weight, columns[:, None], features[None, :]), result)
        store_tile(result, grad_mixture, sentences[:, None], features[None, :])
        gradient = rounded(result, grad_mixture.data.dtype.element_ty)
    # From the rounded gradient, as mixture_bwd's product with the codebook is: the two are subtracted there.
    gradient = gradient.to(tl.float32)
    mean = load_tile(mixture, sentences[:, None], features[None, :])
    num_sentences = mixture.num_rows
    inside = sentences < num_sentences
    wide = sentences.to(tl.int64)
    tl.store(delta_partials + wide * num_partials + partial, tl.sum(gradient * mean, 1), mask=inside)
    likeliest = tl.load(best + sentences, mask=inside, other=-1)
    products = tl.sum(gradient * (load_rows(codebook, likeliest, features) - mean), 1)
    tl.store(delta_partials + (num_sentences + wide) * num_partials + partial, products, mask=inside)
    if TO_ORACLE_WEIGHT:
        action, _ = load_oracle(Oracle(oracle, None), sentences, num_sentences)
        products = tl.sum(gradient * (load_rows(codebook, action, features) - mean), 1)
        products = tl.where(action >= 0, products, 0.0)
        tl.store(delta_partials + (2 * num_sentences + wide) * num_partials + partial, products, mask=inside)


@triton.jit
def _grad_weight_tile(
    program, upstream, mixture, codebook, oracle, grad_weight,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # grad_projected^T times the mixture with the oracle's embedding.
    tiles = tl.cdiv(mixture.num_columns, COLUMNS)
    columns = program // tiles * ROWS + tl.arange(0, ROWS)
    features = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for sentence in range(0, mixture.num_rows, DEPTH):
        sentences = sentence + tl.arange(0, DEPTH)
        gradient = load_tile(upstream, sentences[None, :], columns[:, None])
        mixed = load_mixed(mixture, codebook, oracle, sentences, features)
        result = add_product(gradient, rounded(mixed, gradient.dtype), result)
    store_tile(result, grad_weight, columns[:, None], features[None, :])


@triton.jit
def mixture_bwd_kernel(
    grad_mixture, grad_log_normalizer, grad_oracle_nll, delta_partials, logits, head_bias, noise, statistics, tie_index,
    oracle, oracle_weight, best, codebook, grad_logits, grad_noise, grad_codebook,
    num_sentences, num_actions, size, first_action, num_partials, inverse_temperature,
    grad_mixture_stride, grad_log_normalizer_stride, grad_oracle_nll_stride, logits_stride, noise_stride,
    codebook_stride, grad_logits_stride, grad_noise_stride,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradients of codebook, logits and noise, each where its tensor is given.

    Grid: tiles of `grad_codebook [K, A]`, then of `grad_logits [S, K]`.
    """
    program = tl.program_id(0)
    logits = Matrix(logits, logits_stride, num_sentences, num_actions)
    noise = Matrix(noise, noise_stride, num_sentences, num_actions)
    source = Scores(logits, head_bias, noise, statistics, tie_index, first_action, TOP_K)
    oracle = Oracle(oracle, oracle_weight)
    upstream = Matrix(grad_mixture, grad_mixture_stride, num_sentences, size)
    codebook_tiles = 0
    if grad_codebook is not None:
        codebook_tiles = tl.cdiv(num_actions, ROWS) * tl.cdiv(size, COLUMNS)
        if program < codebook_tiles:
            _grad_codebook_tile(
                program, upstream, source, oracle, Matrix(grad_codebook, size, num_actions, size),
                inverse_temperature, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
    if (grad_logits is not None or grad_noise is not None) and program >= codebook_tiles:
        # Of ROWS by DEPTH, like the scores' tiles elsewhere: everything at its end is elementwise and in registers.
        tiles = tl.cdiv(num_actions, DEPTH)
        sentences = (program - codebook_tiles) // tiles * ROWS + tl.arange(0, ROWS)
        actions = (program - codebook_tiles) % tiles * DEPTH + tl.arange(0, DEPTH)
        gradient = tl.zeros((ROWS, DEPTH), tl.float32)
        label, weight = load_oracle(oracle, sentences, num_sentences)
        if grad_mixture is not None:
            gradient = _grad_probabilities(
                upstream, Matrix(codebook, codebook_stride, num_actions, size), delta_partials, best, sentences,
                actions, first_action, num_partials, COLUMNS,
            ) * (1.0 - weight)[:, None]  # fmt: skip
        inside = sentences < num_sentences
        if grad_log_normalizer is not None:
            at = grad_log_normalizer + sentences.to(tl.int64) * grad_log_normalizer_stride
            gradient += tl.load(at, mask=inside, other=0.0).to(tl.float32)[:, None]
        raw, probabilities = _load_probabilities(source, sentences[:, None], actions[None, :], inverse_temperature)
        gradient = probabilities * gradient * inverse_temperature
        if grad_noise is not None:
            to_noise = Matrix(grad_noise, grad_noise_stride, num_sentences, num_actions)
            store_tile(gradient, to_noise, sentences[:, None], actions[None, :])
        if grad_logits is not None:
            if grad_oracle_nll is not None:
                at = grad_oracle_nll + sentences.to(tl.int64) * grad_oracle_nll_stride
                grad_nll = tl.load(at, mask=inside & (label >= 0), other=0.0).to(tl.float32)
                raw -= load_statistic(source, LOGIT_MAX, sentences)[:, None]
                raw_log_sum = load_statistic(source, LOGIT_LOG_SUM, sentences)
                likelihood = exponential(raw, 1.0) * tl.exp(-raw_log_sum)[:, None]
                hit = label[:, None] == first_action + actions[None, :]
                gradient += grad_nll[:, None] * (likelihood - tl.where(hit, 1.0, 0.0))
            to_logits = Matrix(grad_logits, grad_logits_stride, num_sentences, num_actions)
            store_tile(gradient, to_logits, sentences[:, None], actions[None, :])


@triton.jit
def _load_probabilities(source, sentences, actions, inverse_temperature):
    # Raw logits and probabilities of a tile, as `load_scores`.
    raw, scores = load_scores(source, sentences, actions)
    scores -= load_statistic(source, SCORE_MAX, sentences)
    return raw, exponential(scores, inverse_temperature) * tl.exp(-load_statistic(source, SCORE_LOG_SUM, sentences))


@triton.jit
def _grad_codebook_tile(
    program, upstream, source, oracle, grad_codebook, inverse_temperature,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # ((1 - w) probabilities + w one-hot oracle)^T times the mixture's gradient.
    scale: tl.constexpr = HALF_SCALE if upstream.data.dtype.element_ty == tl.float16 else 1.0
    tiles = tl.cdiv(upstream.num_columns, COLUMNS)
    actions = program // tiles * ROWS + tl.arange(0, ROWS)
    features = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for sentence in range(0, upstream.num_rows, DEPTH):
        sentences = sentence + tl.arange(0, DEPTH)
        _, weights = _load_probabilities(source, sentences[None, :], actions[:, None], inverse_temperature)
        if oracle.weight is not None:
            label, weight = load_oracle(oracle, sentences, upstream.num_rows)
            hit = label[None, :] == source.first_action + actions[:, None]
            weights = (1.0 - weight)[None, :] * weights + tl.where(hit, weight[None, :], 0.0)
        gradient = load_tile(upstream, sentences[:, None], features[None, :])
        result = add_product(rounded(weights * scale, gradient.dtype), gradient, result)
    store_tile(result / scale, grad_codebook, actions[:, None], features[None, :])


@triton.jit
def _grad_probabilities(
    upstream, codebook, delta_partials, best, sentences, actions, first_action, num_partials, STEP: tl.constexpr
):  # fmt: skip
    # grad_mixture codebook^T, less its mean under the probabilities: what a softmax passes on.
    result = tl.zeros((sentences.shape[0], actions.shape[0]), tl.float32)
    for feature in range(0, codebook.num_columns, STEP):
        features = feature + tl.arange(0, STEP)
        gradient = load_tile(upstream, sentences[:, None], features[None, :])
        embeddings = load_tile(codebook, actions[None, :], features[:, None])
        result = add_product(gradient, embeddings, result)
    inside = sentences < upstream.num_rows
    delta = _sum_partials(delta_partials, sentences, inside, num_partials)
    of_best = _sum_partials(delta_partials, upstream.num_rows + sentences, inside, num_partials)
    likeliest = tl.load(best + sentences, mask=inside, other=-1)
    is_best = first_action + actions[None, :] == likeliest[:, None]
    return tl.where(is_best, of_best[:, None], result - delta[:, None])


@triton.jit
def _sum_partials(partials, rows, inside, num_partials):
    total = tl.zeros((rows.shape[0],), tl.float32)
    for first in range(0, num_partials, 16):
        columns = first + tl.arange(0, 16)
        at = partials + rows.to(tl.int64)[:, None] * num_partials + columns[None, :]
        total += tl.sum(tl.load(at, mask=inside[:, None] & (columns < num_partials)[None, :], other=0.0), 1)
    return total
