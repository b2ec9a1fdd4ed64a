"""`plan_projection` on CUDA, composed: softmax kernels of one pass over `[S, K]`, and the library's matrix products.

    softmax_fwd:  scores = logits + head_bias + noise, less all but the top k; p = softmax(scores / temperature)
                  q = (1 - w) p + w one-hot oracle, in the products' dtype; statistics, best action, NLL
    mixture = q codebook        projected = mixture weight^T + bias

    grad_mixture = grad_projected weight    grad_weight = grad_projected^T mixture    dQ = grad_mixture codebook^T
    softmax_bwd:  grad_scores = p ((1 - w) (dQ - p . dQ) + grad_log_normalizer) / temperature
                  grad_logits = grad_scores + grad_oracle_nll (softmax(logits) - one-hot oracle)
                  q again, in the place of dQ
    grad_codebook = q^T grad_mixture

q is not kept for the backward pass. dQ is taken less its value at the likeliest action, d: the softmax's gradient does
not see the difference, and of that action it is then -p (p . d), in which p . d sums what is beside it alone. Where one
action has nearly all of the probability, `dQ - p . dQ` would be the rounding of numbers in the thousands.

Sizes: S sentences, K actions, A action-embedding size, D plan size, P planner state. Optional tensors are None at
compile time.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .operators import ProjectionInputs, ProjectionNeeds, ProjectionOutputs, Statistic, projection_outputs
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
    exponential,
    load_oracle,
    load_probabilities,
    load_scores,
    load_statistic,
    load_tile,
    rounded,
    store_tile,
)
from .triton_launch import INTERPRETED, Tiles, cdiv, launch

_INTERPRETED = Tiles(2, 16)


@triton.jit
def softmax_fwd_kernel(
    logits, head_bias, noise, oracle, oracle_weight,
    out_probabilities, out_statistics, out_tie_index, out_log_normalizer, out_oracle_nll, out_best,
    num_sentences, num_actions, inverse_temperature, logits_stride, noise_stride, out_probabilities_stride,
    TOP_K: tl.constexpr, RAW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Probabilities with the oracle in them, where their tensor is given, and everything of `[S]`. Grid: tiles of S.

    With TOP_K `out_statistics` has the threshold, and `out_tie_index` its last equal. With RAW keeps statistics of the
    logits beside those of the scores.
    """
    sentences = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    matrix = Matrix(logits, logits_stride, num_sentences, num_actions)
    noise = Matrix(noise, noise_stride, num_sentences, num_actions)
    source = Scores(matrix, head_bias, noise, out_statistics, out_tie_index, 0, TOP_K)
    zeros = tl.zeros((ROWS, 1), tl.float32)
    peak, exp_sum, best = zeros - float("inf"), zeros, tl.zeros((ROWS, 1), tl.int64)
    raw_peak, raw_sum = peak, exp_sum
    for action in range(0, num_actions, COLUMNS):
        actions = action + columns
        raw, scores = load_scores(source, sentences, actions)
        highest = tl.max(scores, 1, keep_dims=True)
        at = tl.min(tl.where(scores == highest, actions, num_actions - 1), 1, keep_dims=True)
        best = tl.where(highest > peak, at.to(tl.int64), best)
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        of_tile = tl.sum(exponential(scores - shift, inverse_temperature), 1, keep_dims=True)
        peak, exp_sum = add_exp_sum(peak, exp_sum, highest, of_tile, inverse_temperature)
        if RAW:
            highest = tl.max(raw, 1, keep_dims=True)
            shift = tl.where(highest == -float("inf"), 0.0, highest)
            of_tile = tl.sum(exponential(raw - shift, 1.0), 1, keep_dims=True)
            raw_peak, raw_sum = add_exp_sum(raw_peak, raw_sum, highest, of_tile, 1.0)
    if not RAW:
        raw_peak, raw_sum = peak, exp_sum
    label, weight = load_oracle(Oracle(oracle, oracle_weight), sentences, num_sentences)
    if out_probabilities is not None:
        dtype: tl.constexpr = out_probabilities.dtype.element_ty
        unit: tl.constexpr = HALF_SCALE if dtype == tl.float16 else 1.0
        result = Matrix(out_probabilities, out_probabilities_stride, num_sentences, num_actions)
        factor = unit * (1.0 - weight) / tl.where(sentences < num_sentences, exp_sum, 1.0)
        for back in range(0, num_actions, COLUMNS):  # from the end, which the caches still hold
            actions = (num_actions - 1) // COLUMNS * COLUMNS - back + columns
            _, scores = load_scores(source, sentences, actions)
            probabilities = exponential(scores - peak, inverse_temperature) * factor
            if oracle_weight is not None:
                probabilities += tl.where(actions == label, unit * weight, 0.0)
            store_tile(probabilities, result, sentences, actions)
    inside = sentences < num_sentences
    log_sum, raw_log_sum = tl.log(tl.where(inside, exp_sum, 1.0)), tl.log(tl.where(inside, raw_sum, 1.0))
    statistics = out_statistics + sentences
    tl.store(statistics + SCORE_MAX * num_sentences, peak, mask=inside)
    tl.store(statistics + SCORE_LOG_SUM * num_sentences, log_sum, mask=inside)
    tl.store(statistics + LOGIT_MAX * num_sentences, raw_peak, mask=inside)
    tl.store(statistics + LOGIT_LOG_SUM * num_sentences, raw_log_sum, mask=inside)
    if not TOP_K:
        tl.store(statistics + THRESHOLD * num_sentences, zeros - float("inf"), mask=inside)
        tl.store(out_tie_index + sentences, tl.zeros((ROWS, 1), tl.int64) + (num_actions - 1), mask=inside)
    tl.store(out_log_normalizer + sentences, peak * inverse_temperature + log_sum, mask=inside)
    tl.store(out_best + sentences, best, mask=inside)
    nll = zeros
    if oracle is not None:
        picked, _ = load_scores(source, sentences, tl.maximum(label, 0))
        nll = tl.where(label >= 0, (raw_peak - picked) + raw_log_sum, 0.0)
    tl.store(out_oracle_nll + sentences, nll, mask=inside)


@triton.jit
def softmax_bwd_kernel(
    logits, head_bias, noise, oracle, oracle_weight, statistics, tie_index, best,
    grad_probabilities, grad_log_normalizer, grad_oracle_nll,
    out_logits, out_noise, out_oracle_weight, out_probabilities,
    num_sentences, num_actions, inverse_temperature, logits_stride, noise_stride, grad_probabilities_stride,
    grad_log_normalizer_stride, grad_oracle_nll_stride, out_logits_stride, out_noise_stride, out_probabilities_stride,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of logits, noise and the oracle's weight, and the probabilities again, each where its tensor is given.

    Grid: tiles of S. `out_probabilities` may be `grad_probabilities`: every program has read of an element what there
    is to read before it writes there.
    """
    sentences = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    columns, inside = tl.arange(0, COLUMNS)[None, :], sentences < num_sentences
    matrix = Matrix(logits, logits_stride, num_sentences, num_actions)
    noise = Matrix(noise, noise_stride, num_sentences, num_actions)
    source = Scores(matrix, head_bias, noise, statistics, tie_index, 0, TOP_K)
    label, weight = load_oracle(Oracle(oracle, oracle_weight), sentences, num_sentences)
    upstream = Matrix(grad_probabilities, grad_probabilities_stride, num_sentences, num_actions)
    mean = tl.zeros((ROWS, 1), tl.float32)
    if grad_probabilities is not None:
        likeliest = tl.load(best + sentences, mask=inside, other=0)
        of_best = load_tile(upstream, sentences, likeliest).to(tl.float32)
        for action in range(0, num_actions, COLUMNS):
            actions = action + columns
            _, probabilities = load_probabilities(source, sentences, actions, inverse_temperature)
            distance = load_tile(upstream, sentences, actions).to(tl.float32) - of_best
            mean += tl.sum(tl.where(probabilities == 0, 0.0, probabilities * distance), 1, keep_dims=True)
        if out_oracle_weight is not None:
            of_label = load_tile(upstream, sentences, tl.maximum(label, 0)).to(tl.float32) - of_best
            of_weight = tl.where(label >= 0, of_label - mean, 0.0)
            dtype: tl.constexpr = out_oracle_weight.dtype.element_ty
            tl.store(out_oracle_weight + sentences, rounded(of_weight, dtype), mask=inside)
    shift = tl.zeros((ROWS, 1), tl.float32)
    if grad_log_normalizer is not None:
        at = grad_log_normalizer + sentences.to(tl.int64) * grad_log_normalizer_stride
        shift = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if grad_oracle_nll is not None:
        at = grad_oracle_nll + sentences.to(tl.int64) * grad_oracle_nll_stride
        of_nll = tl.load(at, mask=inside & (label >= 0), other=0.0).to(tl.float32)
        raw_peak, raw_log_sum = (
            load_statistic(source, LOGIT_MAX, sentences),
            load_statistic(source, LOGIT_LOG_SUM, sentences),
        )
    for back in range(0, num_actions, COLUMNS):  # from the end, which the caches still hold
        actions = (num_actions - 1) // COLUMNS * COLUMNS - back + columns
        raw, probabilities = load_probabilities(source, sentences, actions, inverse_temperature)
        gradient = probabilities * shift
        if grad_probabilities is not None:
            distance = load_tile(upstream, sentences, actions).to(tl.float32) - of_best
            passed = probabilities * ((1.0 - weight) * (distance - mean))
            gradient += tl.where(probabilities == 0, 0.0, passed)
        gradient *= inverse_temperature
        if out_noise is not None:
            store_tile(gradient, Matrix(out_noise, out_noise_stride, num_sentences, num_actions), sentences, actions)
        if out_logits is not None:
            if grad_oracle_nll is not None:
                likelihood = exponential(raw - raw_peak, 1.0) * tl.exp(-raw_log_sum)
                gradient += of_nll * (likelihood - tl.where(actions == label, 1.0, 0.0))
            store_tile(gradient, Matrix(out_logits, out_logits_stride, num_sentences, num_actions), sentences, actions)
        if out_probabilities is not None:
            mixed = (1.0 - weight) * probabilities
            if oracle_weight is not None:
                mixed += tl.where(actions == label, weight, 0.0)
            unit: tl.constexpr = HALF_SCALE if out_probabilities.dtype.element_ty == tl.float16 else 1.0
            result = Matrix(out_probabilities, out_probabilities_stride, num_sentences, num_actions)
            tl.debug_barrier()
            store_tile(mixed * unit, result, sentences, actions)


def plan_projection(inputs: ProjectionInputs) -> ProjectionOutputs:
    """Forward of `planlm.kernels.plan_projection` (soft selections) and what its backward needs."""
    if inputs.source.shape[0] == 0:
        return projection_outputs(*inputs)
    outputs = projection_outputs(*inputs._replace(codebook=None, weight=None))  # products bring room of their own
    logits, head_bias = _logits(inputs)
    if inputs.top_k:
        find_threshold(inputs.top_k, outputs, lambda: [(0, scores_of(logits, head_bias, inputs.noise))])
    codebook, weight, bias = inputs.codebook, inputs.weight, inputs.bias
    probabilities = None if codebook is None else torch.empty_like(logits, dtype=codebook.dtype)
    launch(
        softmax_fwd_kernel, *_tiling(logits), logits=logits, head_bias=head_bias,
        noise=inputs.noise, oracle=inputs.oracle, oracle_weight=inputs.oracle_weight,
        out_probabilities=probabilities, out_statistics=outputs.statistics, out_tie_index=outputs.tie_index,
        out_log_normalizer=outputs.log_normalizer, out_oracle_nll=outputs.oracle_nll, out_best=outputs.best,
        num_sentences=logits.shape[0], num_actions=inputs.num_actions, inverse_temperature=1.0 / inputs.temperature,
        TOP_K=bool(inputs.top_k), RAW=inputs.needs_raw,
    )  # fmt: skip
    if codebook is None or probabilities is None:
        return outputs
    mixture = _product(probabilities, codebook)
    bias = None if bias is None else bias.to(codebook.dtype)
    if weight is None:
        return outputs._replace(projected=mixture if bias is None else mixture + bias)
    return outputs._replace(projected=F.linear(mixture, weight, bias), mixture=mixture)


def plan_projection_backward(
    upstream: Sequence[Tensor | None], inputs: ProjectionInputs, saved: ProjectionOutputs, needs: ProjectionNeeds
) -> dict[str, Tensor]:
    """Gradients of the inputs that `needs` names as far as one reaches them, in their dtypes.

    Args:
        upstream: gradients of projected, log_normalizer and oracle_nll (None: zero).
        inputs: the forward's.
        saved: its outputs, from `best` on.
        needs: which gradients are.
    """
    grad_mixture = mixture_backward(upstream[0], inputs, needs)
    found = projection_backward(upstream[0], inputs, saved.mixture, needs)
    if not needs.scores and grad_mixture is None:
        return found
    logits, head_bias = _logits(inputs)
    codebook = inputs.codebook
    from_codebook = None  # what every action's embedding times the mixture's gradient is
    if grad_mixture is not None and (needs.scores or needs.oracle_weight):
        assert codebook is not None
        from_codebook = grad_mixture @ codebook.T
    probabilities = from_codebook
    if not needs.codebook or grad_mixture is None:
        probabilities = None
    elif from_codebook is None:
        probabilities = torch.empty_like(logits, dtype=grad_mixture.dtype)
    grad_logits = torch.empty_like(logits, dtype=inputs.source.dtype) if needs.logits else None
    if needs.noise and inputs.noise is not None:
        found["noise"] = torch.empty_like(inputs.noise)
    if needs.oracle_weight and from_codebook is not None:
        found["oracle_weight"] = torch.empty_like(inputs.oracle_weight)
    launch(
        softmax_bwd_kernel, *_tiling(logits), logits=logits, head_bias=head_bias,
        noise=inputs.noise, oracle=inputs.oracle, oracle_weight=inputs.oracle_weight, statistics=saved.statistics,
        tie_index=saved.tie_index, best=saved.best, grad_probabilities=from_codebook,
        grad_log_normalizer=upstream[1], grad_oracle_nll=None if inputs.oracle is None else upstream[2],
        out_logits=grad_logits, out_noise=found.get("noise"), out_oracle_weight=found.get("oracle_weight"),
        out_probabilities=probabilities, num_sentences=logits.shape[0], num_actions=inputs.num_actions,
        inverse_temperature=1.0 / inputs.temperature, TOP_K=bool(inputs.top_k),
    )  # fmt: skip
    if probabilities is not None and grad_mixture is not None:
        found["codebook"] = _product(probabilities.T, grad_mixture)
    if grad_logits is None:
        return found
    if inputs.head is None:
        return found | {"source": grad_logits}
    if needs.source:
        found["source"] = grad_logits @ inputs.head
    if needs.head:
        found["head"] = grad_logits.T @ inputs.source
    if needs.head_bias and head_bias is not None:
        found["head_bias"] = grad_logits.sum(0, dtype=torch.float32).to(head_bias.dtype)
    return found


def mixture_backward(grad_projected: Tensor | None, inputs: ProjectionInputs, needs: ProjectionNeeds) -> Tensor | None:
    """The mixture's gradient `[S, A]` from `grad_projected [S, D]`; None where none comes or nothing below needs it."""
    if grad_projected is None or inputs.codebook is None or inputs.source.shape[0] == 0:
        return None
    if not (needs.scores or needs.codebook or needs.oracle_weight):
        return None
    return grad_projected if inputs.weight is None else grad_projected @ inputs.weight


def projection_backward(
    grad_projected: Tensor | None, inputs: ProjectionInputs, mixture: Tensor, needs: ProjectionNeeds
) -> dict[str, Tensor]:
    """Gradients of weight and bias.

    Args:
        grad_projected: `[S, D]`, or None.
        inputs: the forward's.
        mixture: with the oracle's embedding in it, in the products' dtype; not read without weight.
        needs: which gradients are.
    """
    found: dict[str, Tensor] = {}
    if grad_projected is None or inputs.codebook is None or inputs.source.shape[0] == 0:
        return found
    if needs.bias and inputs.bias is not None:
        found["bias"] = grad_projected.sum(0, dtype=torch.float32).to(inputs.bias.dtype)
    if needs.weight:
        found["weight"] = grad_projected.T @ mixture
    return found


def _logits(inputs: ProjectionInputs) -> tuple[Tensor, Tensor | None]:
    """The logits `[S, K]` and what is still to be added to them; from states in float32, never rounded."""
    if inputs.head is None:
        return inputs.source, None
    return product_in_float32(inputs.source, inputs.head.T), inputs.head_bias


def _tiling(logits: Tensor) -> tuple[tuple[int, int, int], Tiles]:
    """Grid and tiles of the softmax kernels: a row a program, of few actions several rows."""
    num_sentences, num_actions = logits.shape
    tiles = _INTERPRETED if INTERPRETED else _tiles_of(num_actions, logits.itemsize)
    return (cdiv(num_sentences, tiles.rows), 1, 1), tiles


@cache
def _tiles_of(num_actions: int, itemsize: int) -> Tiles:
    columns = min(4096, triton.next_power_of_2(num_actions))
    rows = max(1, min(16, 1024 // columns))
    # One load of 16 bytes a thread: with more, or with many short rows, sm_100 and sm_120 spill.
    return Tiles(rows, columns, num_warps=max(4, min(32, columns * itemsize // 512)))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of probabilities, which float16 holds `HALF_SCALE` times as large."""
    if right.dtype != torch.float16:
        return left @ right
    return product_in_float32(left, right).mul_(1 / HALF_SCALE.value).to(right.dtype)


def product_in_float32(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """`left @ right`, summed and returned in float32 whatever the operands' dtype."""
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    if left.is_cpu:  # the interpreter: no product of the library's here gives float32 for half-precision operands
        exact = left.float() @ right.float()
        return exact if out is None else out.copy_(exact)
    if out is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def scores_of(logits: Tensor, head_bias: Tensor | None, noise: Tensor | None) -> Tensor:
    """Scores before the top k, float32: bit for bit what the kernels compute."""
    scores = logits.float()
    for added in (head_bias, noise):
        scores = scores if added is None else scores + added.float()
    return scores


def find_threshold(top_k: int, outputs: ProjectionOutputs, chunks: Callable[[], Iterable[tuple[int, Tensor]]]) -> None:
    """The lowest score that the top k keeps, and the last of its equals kept, into statistics and tie_index.

    Args:
        top_k: scores that are kept.
        outputs: with room for both.
        chunks: makes the scores `[S, some]`, each time anew, with the number of the first action of each chunk.
    """
    largest: Tensor | None = None  # so far, [S, at most top_k]
    for _, scores in chunks():
        found = scores.topk(min(top_k, scores.shape[1]), dim=1).values
        largest = found if largest is None else torch.cat([largest, found], dim=1)
        largest = largest.topk(min(top_k, largest.shape[1]), dim=1).values
    assert largest is not None
    threshold = largest[:, -1:]
    spare = top_k - (largest > threshold).sum(1, keepdim=True)  # so many of the equals are kept, the lowest first
    last = torch.zeros_like(spare)
    for first, scores in chunks():
        equal = scores == threshold
        rank = equal.cumsum(1)
        at = (equal & (rank == spare)).to(torch.uint8).max(1, keepdim=True)
        last = torch.where(at.values > 0, first + at.indices, last)
        spare = spare - rank[:, -1:]
    outputs.statistics[Statistic.THRESHOLD].copy_(threshold[:, 0])
    outputs.tie_index.copy_(last[:, 0])
