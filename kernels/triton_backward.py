"""Device code of `plan_projection`: the backward kernels. `triton_forward` has the formulas and what names mean.

dM = grad_projected weight        grad_weight = grad_projected^T mixed        grad_bias = sum_s grad_projected
grad_scores = p ((1 - w) (dM codebook^T - dM . mixture) + grad_log_normalizer) / temperature
    of the likeliest action dM . (its row of codebook - mixture): where it has nearly all of the probability the
    difference of the two products, numbers in the thousands, would be their rounding
grad_logits = grad_scores + grad_oracle_nll (softmax(logits) - one-hot oracle)
grad_codebook = ((1 - w) p + w one-hot oracle)^T dM
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from .triton_forward import HALF_SCALE, load_mixed, load_oracle, load_scores
from .triton_numerics import add_product, exponential, rounded


@triton.jit
def projection_bwd_kernel(
    grad_projected, mixture, codebook, weight, oracle, oracle_weight, best,
    grad_mixture, grad_weight, grad_bias, delta_parts, share_parts,
    num_rows, size, plan_size, num_parts, grad_projected_stride, codebook_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradients of mixture (with what follows from it row by row), weight and bias, each where its tensor is given.

    Grid: tiles of `grad_mixture [S, A]`, then of `grad_weight [D, A]`, then of `grad_bias [D]`.
    """
    program = tl.program_id(0)
    mixture_tiles = tl.cdiv(num_rows, ROWS) * num_parts
    weight_tiles = tl.cdiv(plan_size, ROWS) * tl.cdiv(size, COLUMNS) if grad_weight is not None else 0
    if program < mixture_tiles:
        _grad_mixture_tile(
            program, grad_projected, mixture, codebook, weight, oracle, best, grad_mixture, delta_parts, share_parts,
            num_rows, size, plan_size, num_parts, grad_projected_stride, codebook_stride, weight_stride,
            ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    elif program < mixture_tiles + weight_tiles:
        if grad_weight is not None:
            _grad_weight_tile(
                program - mixture_tiles, grad_projected, mixture, codebook, oracle, oracle_weight, grad_weight,
                num_rows, size, plan_size, grad_projected_stride, codebook_stride, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
    elif grad_bias is not None:
        # A role of its own: inside the product's loop the sum would need every tile in registers as well.
        columns = (program - mixture_tiles - weight_tiles) * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros((COLUMNS,), tl.float32)
        for row in range(0, num_rows, DEPTH):
            rows = row + tl.arange(0, DEPTH)
            inside = (rows < num_rows)[:, None] & (columns < plan_size)[None, :]
            at = grad_projected + rows.to(tl.int64)[:, None] * grad_projected_stride + columns[None, :]
            sums += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32), 0)
        tl.store(grad_bias + columns, rounded(sums, grad_bias.dtype.element_ty), mask=columns < plan_size)


@triton.jit
def _grad_mixture_tile(
    program, grad_projected, mixture, codebook, weight, oracle, best, grad_mixture, delta_parts, share_parts,
    num_rows, size, plan_size, num_parts, grad_projected_stride, codebook_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # grad_projected weight; of each row its products with the mixture, with the likeliest action's row less the mixture
    # and with the oracle's row less the mixture.
    rows = program // num_parts * ROWS + tl.arange(0, ROWS)
    part = program % num_parts
    places = part * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (places < size)[None, :]
    wide = rows.to(tl.int64)[:, None]
    if weight is None:
        gradient = tl.load(grad_projected + wide * grad_projected_stride + places[None, :], mask=inside, other=0.0)
    else:
        result = tl.zeros((ROWS, COLUMNS), tl.float32)
        for column in range(0, plan_size, DEPTH):
            columns = column + tl.arange(0, DEPTH)
            row_mask = (rows < num_rows)[:, None] & (columns < plan_size)[None, :]
            upstream = tl.load(
                grad_projected + wide * grad_projected_stride + columns[None, :], mask=row_mask, other=0.0
            )
            at = weight + columns.to(tl.int64)[:, None] * weight_stride + places[None, :]
            factors = tl.load(at, mask=(columns < plan_size)[:, None] & (places < size)[None, :], other=0.0)
            result = add_product(upstream, factors, result)
        gradient = rounded(result, grad_mixture.dtype.element_ty)
        tl.store(grad_mixture + wide * size + places[None, :], gradient, mask=inside)
    # From the rounded gradient, as mixture_bwd's product with the codebook is: the two are subtracted there.
    gradient = gradient.to(tl.float32)
    mean = tl.load(mixture + wide * size + places[None, :], mask=inside, other=0.0)
    wide_rows = rows.to(tl.int64)
    at_parts = wide_rows * num_parts + part
    tl.store(delta_parts + at_parts, tl.sum(gradient * mean, 1), mask=rows < num_rows)
    likeliest = tl.load(best + rows, mask=rows < num_rows, other=0)
    chosen = tl.load(codebook + likeliest[:, None] * codebook_stride + places[None, :], mask=inside, other=0.0)
    difference = tl.where(inside, chosen.to(tl.float32) - mean, 0.0)
    at_best = (num_rows + wide_rows) * num_parts + part
    tl.store(delta_parts + at_best, tl.sum(gradient * difference, 1), mask=rows < num_rows)
    if share_parts is not None:
        label, _ = load_oracle(oracle, None, rows, num_rows)
        labelled = inside & (label >= 0)[:, None]
        chosen = tl.load(codebook + label[:, None] * codebook_stride + places[None, :], mask=labelled, other=0.0)
        difference = tl.where(labelled, chosen.to(tl.float32) - mean, 0.0)
        tl.store(share_parts + at_parts, tl.sum(gradient * difference, 1), mask=rows < num_rows)


@triton.jit
def _grad_weight_tile(
    program, grad_projected, mixture, codebook, oracle, oracle_weight, grad_weight,
    num_rows, size, plan_size, grad_projected_stride, codebook_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # grad_projected^T times the mixture with the oracle's share.
    tiles = tl.cdiv(size, COLUMNS)
    columns = program // tiles * ROWS + tl.arange(0, ROWS)
    places = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in range(0, num_rows, DEPTH):
        rows = row + tl.arange(0, DEPTH)
        inside = (columns < plan_size)[:, None] & (rows < num_rows)[None, :]
        at = grad_projected + rows.to(tl.int64)[None, :] * grad_projected_stride + columns[:, None]
        upstream = tl.load(at, mask=inside, other=0.0)
        mixed = load_mixed(mixture, codebook, oracle, oracle_weight, rows, places, codebook_stride, num_rows, size)
        result = add_product(upstream, rounded(mixed, upstream.dtype), result)
    written = (columns < plan_size)[:, None] & (places < size)[None, :]
    result = rounded(result, grad_weight.dtype.element_ty)
    tl.store(grad_weight + columns.to(tl.int64)[:, None] * size + places[None, :], result, mask=written)


@triton.jit
def mixture_bwd_kernel(
    grad_mixture, grad_log_normalizer, grad_oracle_nll, delta_parts, logits, head_bias, noise, statistics, cut,
    oracle, oracle_weight, best, codebook, grad_logits, grad_noise, grad_codebook,
    num_rows, num_columns, size, first_column, num_parts, inverse_temperature,
    grad_mixture_stride, grad_log_normalizer_stride, grad_oracle_nll_stride, logits_stride, noise_stride,
    codebook_stride, grad_logits_stride, grad_noise_stride,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradients of codebook, logits and noise, each where its tensor is given.

    Grid: tiles of `grad_codebook [K, A]`, then of `grad_logits [S, K]`.
    """
    program = tl.program_id(0)
    codebook_tiles = 0
    if grad_codebook is not None:
        codebook_tiles = tl.cdiv(num_columns, ROWS) * tl.cdiv(size, COLUMNS)
        if program < codebook_tiles:
            _grad_codebook_tile(
                program, grad_mixture, logits, head_bias, noise, statistics, cut, oracle, oracle_weight,
                grad_codebook, num_rows, num_columns, size, first_column, inverse_temperature, grad_mixture_stride,
                logits_stride, noise_stride, TOP_K, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
    if (grad_logits is not None or grad_noise is not None) and program >= codebook_tiles:
        _grad_scores_tile(
            program - codebook_tiles, grad_mixture, grad_log_normalizer, grad_oracle_nll, delta_parts, logits,
            head_bias, noise, statistics, cut, oracle, oracle_weight, best, codebook, grad_logits, grad_noise,
            num_rows, num_columns, size, first_column, num_parts, inverse_temperature, grad_mixture_stride,
            grad_log_normalizer_stride, grad_oracle_nll_stride, logits_stride, noise_stride, codebook_stride,
            grad_logits_stride, grad_noise_stride, TOP_K, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip


@triton.jit
def _grad_codebook_tile(
    program, grad_mixture, logits, head_bias, noise, statistics, cut, oracle, oracle_weight,
    grad_codebook, num_rows, num_columns, size, first_column, inverse_temperature, grad_mixture_stride,
    logits_stride, noise_stride, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # ((1 - w) probabilities + w one-hot oracle)^T times the mixture's gradient.
    scale: tl.constexpr = HALF_SCALE if grad_mixture.dtype.element_ty == tl.float16 else 1.0
    tiles = tl.cdiv(size, COLUMNS)
    actions = program // tiles * ROWS + tl.arange(0, ROWS)
    places = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in range(0, num_rows, DEPTH):
        rows = row + tl.arange(0, DEPTH)
        _, scores = load_scores(
            logits, head_bias, noise, statistics, cut, rows[None, :], actions[:, None], logits_stride, noise_stride,
            num_rows, num_columns, first_column, TOP_K,
        )  # fmt: skip
        peak = tl.load(statistics + rows, mask=rows < num_rows, other=0.0)
        log_total = tl.load(statistics + num_rows + rows, mask=rows < num_rows, other=0.0)
        weights = exponential(scores - peak[None, :], inverse_temperature) * tl.exp(-log_total)[None, :]
        if oracle_weight is not None:
            label, share = load_oracle(oracle, oracle_weight, rows, num_rows)
            chosen = tl.where(label[None, :] == first_column + actions[:, None], share[None, :], 0.0)
            weights = (1.0 - share)[None, :] * weights + chosen
        inside = (rows < num_rows)[:, None] & (places < size)[None, :]
        at = grad_mixture + rows.to(tl.int64)[:, None] * grad_mixture_stride + places[None, :]
        upstream = tl.load(at, mask=inside, other=0.0)
        result = add_product(rounded(weights * scale, upstream.dtype), upstream, result)
    written = (actions < num_columns)[:, None] & (places < size)[None, :]
    result = rounded(result / scale, grad_codebook.dtype.element_ty)
    tl.store(grad_codebook + actions.to(tl.int64)[:, None] * size + places[None, :], result, mask=written)


@triton.jit
def _grad_scores_tile(
    program, grad_mixture, grad_log_normalizer, grad_oracle_nll, delta_parts, logits,
    head_bias, noise, statistics, cut, oracle, oracle_weight, best, codebook, grad_logits, grad_noise,
    num_rows, num_columns, size, first_column, num_parts, inverse_temperature, grad_mixture_stride,
    grad_log_normalizer_stride, grad_oracle_nll_stride, logits_stride, noise_stride, codebook_stride,
    grad_logits_stride, grad_noise_stride, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Of ROWS by DEPTH, like the scores' tiles elsewhere: everything at its end is elementwise and in registers.
    tiles = tl.cdiv(num_columns, DEPTH)
    rows = program // tiles * ROWS + tl.arange(0, ROWS)
    columns = program % tiles * DEPTH + tl.arange(0, DEPTH)
    in_rows = rows < num_rows
    label, share = load_oracle(oracle, oracle_weight, rows, num_rows)
    arriving = tl.zeros((ROWS, DEPTH), tl.float32)
    if grad_mixture is not None:
        arriving = _grad_probabilities(
            grad_mixture, codebook, delta_parts, best, rows, columns, grad_mixture_stride, codebook_stride,
            num_rows, num_columns, size, first_column, num_parts, COLUMNS,
        ) * (1.0 - share)[:, None]  # fmt: skip
    if grad_log_normalizer is not None:
        at = grad_log_normalizer + rows.to(tl.int64) * grad_log_normalizer_stride
        arriving += tl.load(at, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    raw, scores = load_scores(
        logits, head_bias, noise, statistics, cut, rows[:, None], columns[None, :], logits_stride, noise_stride,
        num_rows, num_columns, first_column, TOP_K,
    )  # fmt: skip
    peak = tl.load(statistics + rows, mask=in_rows, other=0.0)
    log_total = tl.load(statistics + num_rows + rows, mask=in_rows, other=0.0)
    shares = exponential(scores - peak[:, None], inverse_temperature) * tl.exp(-log_total)[:, None]
    gradient = shares * arriving * inverse_temperature
    written = in_rows[:, None] & (columns < num_columns)[None, :]
    wide = rows.to(tl.int64)[:, None]
    if grad_noise is not None:
        at = grad_noise + wide * grad_noise_stride + columns[None, :]
        tl.store(at, rounded(gradient, grad_noise.dtype.element_ty), mask=written)
    if grad_logits is not None:
        if grad_oracle_nll is not None:
            labelled = in_rows & (label >= 0)
            at_nll = grad_oracle_nll + rows.to(tl.int64) * grad_oracle_nll_stride
            upstream = tl.load(at_nll, mask=labelled, other=0.0).to(tl.float32)
            raw_peak = tl.load(statistics + 2 * num_rows + rows, mask=in_rows, other=0.0)
            raw_log_total = tl.load(statistics + 3 * num_rows + rows, mask=in_rows, other=0.0)
            likelihood = exponential(raw - raw_peak[:, None], 1.0) * tl.exp(-raw_log_total)[:, None]
            hit = label[:, None] == first_column + columns[None, :]
            gradient += upstream[:, None] * (likelihood - tl.where(hit, 1.0, 0.0))
        at = grad_logits + wide * grad_logits_stride + columns[None, :]
        tl.store(at, rounded(gradient, grad_logits.dtype.element_ty), mask=written)


@triton.jit
def _grad_probabilities(
    grad_mixture, codebook, delta_parts, best, rows, columns, grad_mixture_stride, codebook_stride,
    num_rows, num_columns, size, first_column, num_parts, STEP: tl.constexpr,
):  # fmt: skip
    # grad_mixture codebook^T, less its mean under the probabilities: what a softmax passes on.
    result = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for place in range(0, size, STEP):
        places = place + tl.arange(0, STEP)
        row_mask = (rows < num_rows)[:, None] & (places < size)[None, :]
        at_rows = grad_mixture + rows.to(tl.int64)[:, None] * grad_mixture_stride + places[None, :]
        upstream = tl.load(at_rows, mask=row_mask, other=0.0)
        column_mask = (places < size)[:, None] & (columns < num_columns)[None, :]
        at_columns = codebook + columns.to(tl.int64)[None, :] * codebook_stride + places[:, None]
        actions = tl.load(at_columns, mask=column_mask, other=0.0)
        result = add_product(upstream, actions, result)
    delta = _sum_of_parts(delta_parts, rows, rows < num_rows, num_parts)
    of_best = _sum_of_parts(delta_parts, num_rows + rows, rows < num_rows, num_parts)
    likeliest = tl.load(best + rows, mask=rows < num_rows, other=-1)
    is_best = first_column + columns[None, :] == likeliest[:, None]
    return tl.where(is_best, of_best[:, None], result - delta[:, None])


@triton.jit
def _sum_of_parts(parts, rows, in_rows, num_parts):
    total = tl.zeros((rows.shape[0],), tl.float32)
    for first in range(0, num_parts, 16):
        part = first + tl.arange(0, 16)
        inside = in_rows[:, None] & (part < num_parts)[None, :]
        at = parts + rows.to(tl.int64)[:, None] * num_parts + part[None, :]
        total += tl.sum(tl.load(at, mask=inside, other=0.0), 1)
    return total
