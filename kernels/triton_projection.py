"""`plan_projection` on CUDA: which kernels run on what, forward and backward, from logits or from hidden states.

Launches from logits: 2 forward (3 where the actions are split over programs), 2 backward. From hidden states the first
forward and the second backward one run once for each chunk of logits (`triton_planner`): the forward goes on from the
state that the chunks before have left, the backward computes each chunk anew.

Sizes: S sentences, K actions, A action-embedding size, D plan size, P planner state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
from torch import Tensor

from .triton_backward import mixture_bwd_kernel, projection_bwd_kernel
from .triton_forward import PARTS, combine_fwd_kernel, mixture_fwd_kernel, projection_fwd_kernel
from .triton_planner import Chunk, Planner, dense, find_threshold, make_planner, product
from .triton_tiles import Tiles, choose_tiles, launch, num_processors, with_unit_columns

OPERATORS = ("plan_projection", "plan_projection_backward")
"""What this backend implements here; `operators` has the schemas."""

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Gradients:
    """Where the gradients of the inputs go; None: not needed."""

    source: Tensor | None
    head: Tensor | None
    head_bias: Tensor | None
    codebook: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    noise: Tensor | None
    oracle_weight: Tensor | None

    @property
    def of_logits(self) -> bool:
        """Whether anything before the logits wants one, or they themselves."""
        return self.source is not None or self.head is not None or self.head_bias is not None

    @property
    def of_scores(self) -> bool:
        """The same of the scores."""
        return self.of_logits or self.noise is not None


@dataclass(frozen=True)
class _Arriving:
    """The gradients that the mixture's kernel starts from; None: zero."""

    mixture: Tensor | None
    delta_parts: Tensor | None
    log_normalizer: Tensor | None
    oracle_nll: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the kernel reads of it."""
        return self.mixture, self.delta_parts, self.log_normalizer, self.oracle_nll


def plan_projection(
    source: Tensor,
    head: Tensor | None,
    head_bias: Tensor | None,
    codebook: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    noise: Tensor | None,
    oracle: Tensor | None,
    oracle_weight: Tensor | None,
    temperature: float,
    top_k: int,
) -> Outputs:
    """Forward of `planlm.kernels.plan_projection` (soft selections) and what its backward needs.

    Args:
        source (Tensor): logits `[S, K]`, or with head planner states `[S, P]`.
        head (Tensor | None): `[K, P]`.
        head_bias (Tensor | None): `[K]`.
        codebook (Tensor | None): `[K, A]`; None: statistics only.
        weight (Tensor | None): `[D, A]` in codebook's dtype; None: the mixture itself is projected, D = A.
        bias (Tensor | None): `[D]`.
        noise (Tensor | None): `[S, K]`.
        oracle (Tensor | None): int64 `[S]`; negative: none.
        oracle_weight (Tensor | None): `[S]`; None: 0.
        temperature (float): divides the scores.
        top_k (int): scores kept; 0: all.

    Returns:
        Outputs: `projected [S, D]` in codebook's dtype, `log_normalizer [S]` and `oracle_nll [S]` float32, `best [S]`
        (the largest score's action), `mixture [S, A]` float32 before the oracle's share, `statistics [5, S]` float32
        (largest score, log of the sum of exp((score - largest) / temperature), the same of the logits, lowest score
        kept; those of the logits only where oracle is given) and `cut [S]`: the last action kept among equals.
    """
    planner = make_planner(source, head, head_bias, noise, oracle, temperature, top_k)
    codebook, weight = dense(codebook), dense(weight)
    num_sentences, size = planner.num_sentences, 0 if codebook is None else codebook.shape[1]
    plan_size = size if weight is None else weight.shape[0]
    statistics = source.new_empty(5, num_sentences, dtype=torch.float32)
    cut = source.new_empty(num_sentences, dtype=torch.int64)
    mixture = source.new_empty(0, size, dtype=torch.float32)
    projected = source.new_empty(num_sentences, plan_size, dtype=torch.float32 if codebook is None else codebook.dtype)
    log_normalizer, oracle_nll = torch.empty_like(statistics[0]), torch.empty_like(statistics[0])
    best = torch.empty_like(cut)
    if num_sentences > 0:
        if planner.top_k:
            find_threshold(planner, statistics, cut)

        def mix(tiles: Tiles) -> tuple[Tensor, Tensor]:
            return _mix(planner, codebook, statistics, cut, tiles)

        operand = source if codebook is None else codebook
        sizes = (planner.num_actions, size)
        parts, mixture = mix(choose_tiles("mixture_fwd", sizes, operand, *planner.matrices, trial=mix))

        def project(tiles: Tiles) -> None:
            outputs = (projected, statistics, cut, log_normalizer, oracle_nll, best)
            _project(planner, parts, mixture, codebook, weight, bias, oracle_weight, outputs, tiles)

        sizes = (size, plan_size)
        project(choose_tiles("projection_fwd", sizes, operand, weight, mixture, projected, trial=project))
    return projected, log_normalizer, oracle_nll, best, mixture, statistics, cut


def _ranges(planner: Planner, codebook: Tensor | None, tiles: Tiles) -> tuple[int, int]:
    """Over how many programs the actions of a chunk are split, and how many actions each gets.

    As many as fill the device, but no more than keep the means of all ranges, written once and read once in float32,
    below half the bytes that the kernel reads anyway.
    """
    num_sentences, size = planner.num_sentences, 0 if codebook is None else codebook.shape[1]
    busy = triton.cdiv(num_sentences, tiles.rows) * max(1, triton.cdiv(size, tiles.columns))
    wanted = num_processors(planner.source.device) // busy
    if codebook is not None and size > 0:
        logits_bytes = num_sentences * planner.num_actions * planner.source.element_size()
        codebook_bytes = codebook.numel() * codebook.element_size()
        wanted = min(wanted, (logits_bytes + codebook_bytes) // (16 * num_sentences * size))
    steps = triton.cdiv(planner.width, tiles.depth)
    steps_each = triton.cdiv(steps, min(max(wanted, 1), steps))
    return triton.cdiv(steps, steps_each), steps_each * tiles.depth


def _mix(
    planner: Planner, codebook: Tensor | None, statistics: Tensor, cut: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """`parts [ranges, PARTS, S]` and `mixture [S, A]`."""
    num_sentences, size = planner.num_sentences, 0 if codebook is None else codebook.shape[1]
    num_splits, columns_per_split = _ranges(planner, codebook, tiles)
    parts, spare = statistics.new_empty(2, num_splits, PARTS.value, num_sentences)
    earlier = None
    means = statistics.new_empty(num_splits, num_sentences, size)
    grid = (max(1, triton.cdiv(size, tiles.columns)), triton.cdiv(num_sentences, tiles.rows), num_splits)
    for chunk in planner.chunks():
        actions = None if codebook is None else codebook[chunk.actions]
        kept = (statistics[4], cut) if planner.top_k else ()
        launch(
            mixture_fwd_kernel, grid, tiles,
            reads=(*chunk.tensors, *kept, planner.oracle, actions, earlier, None if earlier is None else means),
            writes=(parts, means),
            **chunk.arguments(), statistics=statistics, cut=cut, oracle=planner.oracle, codebook=actions,
            partial=means, earlier=earlier, parts=parts, size=size, columns_per_split=columns_per_split,
            inverse_temperature=1.0 / planner.temperature, codebook_stride=_row_stride(actions),
            TOP_K=planner.top_k > 0, RAW=planner.raw,
        )  # fmt: skip
        earlier, parts, spare = parts, spare, parts
    assert earlier is not None
    return earlier, means[0] if num_splits == 1 or size == 0 else _combine(planner, means, earlier)


def _combine(planner: Planner, means: Tensor, parts: Tensor) -> Tensor:
    num_splits, num_sentences, size = means.shape
    mixture = torch.empty_like(means[0])
    tiles = choose_tiles("combine_fwd", (size,), means)
    launch(
        combine_fwd_kernel, (triton.cdiv(size, tiles.columns), triton.cdiv(num_sentences, tiles.rows)), tiles,
        reads=(means, parts), writes=(mixture,),
        partial=means, parts=parts, mixture=mixture, num_rows=num_sentences, size=size, num_splits=num_splits,
        inverse_temperature=1.0 / planner.temperature,
    )  # fmt: skip
    return mixture


def _project(
    planner: Planner, parts: Tensor, mixture: Tensor, codebook: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, oracle_weight: Tensor | None, outputs: tuple[Tensor, ...], tiles: Tiles,
) -> None:  # fmt: skip
    projected, statistics, cut, log_normalizer, oracle_nll, best = outputs
    num_sentences, plan_size = projected.shape
    share = None if planner.oracle is None or oracle_weight is None else oracle_weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    launch(
        projection_fwd_kernel,
        (max(1, triton.cdiv(plan_size, tiles.columns)), triton.cdiv(num_sentences, tiles.rows)), tiles,
        reads=(parts, mixture, weight, bias, planner.oracle, share, _gathered_bytes(codebook, share)),
        writes=outputs,
        parts=parts, mixture=mixture, codebook=codebook, weight=weight, bias=bias, oracle=planner.oracle,
        oracle_weight=share, projected=projected, statistics=statistics, cut=cut, log_normalizer=log_normalizer,
        oracle_nll=oracle_nll, best=best, num_rows=num_sentences, num_columns=planner.num_actions,
        size=mixture.shape[1], plan_size=plan_size, num_splits=parts.shape[0],
        inverse_temperature=1.0 / planner.temperature, codebook_stride=_row_stride(codebook),
        weight_stride=_row_stride(weight), TOP_K=planner.top_k > 0, RAW=planner.raw,
    )  # fmt: skip


def plan_projection_backward(
    grad_projected: Tensor | None,
    grad_log_normalizer: Tensor | None,
    grad_oracle_nll: Tensor | None,
    source: Tensor,
    head: Tensor | None,
    head_bias: Tensor | None,
    codebook: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    noise: Tensor | None,
    oracle: Tensor | None,
    oracle_weight: Tensor | None,
    best: Tensor,
    mixture: Tensor,
    statistics: Tensor,
    cut: Tensor,
    temperature: float,
    top_k: int,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of source, head, head_bias, codebook, weight, bias, noise and oracle_weight, in their dtypes.

    Args:
        grad_projected, grad_log_normalizer, grad_oracle_nll (Tensor | None): of the outputs; None: zero.
        source ... oracle_weight, temperature, top_k: as in the forward.
        best, mixture, statistics, cut (Tensor): what the forward returned.
        needs (list[bool]): which of the eight to compute; the others come back as empty tensors.
    """
    planner = make_planner(source, head, head_bias, noise, oracle, temperature, top_k)
    codebook, weight = dense(codebook), dense(weight)
    share = None if oracle is None or oracle_weight is None else oracle_weight.contiguous()
    inputs = (source, head, head_bias, codebook, weight, bias, noise, oracle_weight)
    grads = _Gradients(
        *(
            None
            if tensor is None or not needed
            else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            for tensor, needed in zip(inputs, needs, strict=True)
        )
    )
    arriving = _Arriving(None, None, grad_log_normalizer, None if oracle is None else grad_oracle_nll)
    if grad_projected is None or codebook is None or planner.num_sentences == 0:
        # Nothing reaches the mixture, so what only it depends on has no gradient.
        for unreached in (grads.codebook, grads.weight, grads.bias, grads.oracle_weight):
            if unreached is not None:
                unreached.zero_()
    else:
        grad_mixture, delta_parts = _project_backward(
            with_unit_columns(grad_projected), planner, best, mixture, codebook, weight, share, grads
        )
        arriving = replace(arriving, mixture=grad_mixture, delta_parts=delta_parts)
    if planner.num_sentences == 0:
        for gradient in (found for found in vars(grads).values() if found is not None):
            gradient.zero_()
    elif grads.of_scores or (grads.codebook is not None and arriving.mixture is not None):
        _mix_backward(arriving, planner, codebook, share, best, statistics, cut, grads)
    return [source.new_empty(0) if gradient is None else gradient for gradient in vars(grads).values()]


def _project_backward(
    grad_projected: Tensor,
    planner: Planner,
    best: Tensor,
    mixture: Tensor,
    codebook: Tensor,
    weight: Tensor | None,
    share: Tensor | None,
    grads: _Gradients,
) -> tuple[Tensor, Tensor]:
    """Fill the gradients of weight, bias and oracle_weight.

    Returns the mixture's gradient `[S, A]` and the parts `[2, S, tiles of A]` of its products with the mixture and with
    the likeliest action's embedding less the mixture.
    """
    num_sentences, size = mixture.shape
    plan_size = grad_projected.shape[1]
    grad_mixture = grad_projected if weight is None else torch.empty_like(mixture, dtype=codebook.dtype)
    reaches_mixture = grads.of_scores or grads.codebook is not None or grads.oracle_weight is not None
    shared = share is not None and grads.oracle_weight is not None

    def run(tiles: Tiles) -> tuple[Tensor, Tensor | None]:
        num_tiles = triton.cdiv(size, tiles.columns)
        num_parts = num_tiles if reaches_mixture else 0
        delta_parts = mixture.new_empty(2, num_sentences, num_parts)
        share_parts = mixture.new_empty(num_sentences, num_parts) if shared else None
        grid = triton.cdiv(num_sentences, tiles.rows) * num_parts
        if grads.weight is not None:
            grid += triton.cdiv(plan_size, tiles.rows) * num_tiles
        if grads.bias is not None:
            grid += triton.cdiv(plan_size, tiles.columns)
        used = share if grads.weight is not None else None
        written = grad_mixture if reaches_mixture and weight is not None else None
        launch(
            projection_bwd_kernel, (grid,), tiles,
            reads=(grad_projected, mixture, weight if reaches_mixture else None, planner.oracle, used,
                   *((best, _gathered_bytes(codebook, best)) if reaches_mixture else ()),
                   _gathered_bytes(codebook, used if share_parts is None else share)),
            writes=(written, grads.weight, grads.bias, delta_parts, share_parts),
            grad_projected=grad_projected, mixture=mixture, codebook=codebook, weight=weight, oracle=planner.oracle,
            oracle_weight=share, best=best, grad_mixture=grad_mixture, grad_weight=grads.weight, grad_bias=grads.bias,
            delta_parts=delta_parts, share_parts=share_parts, num_rows=num_sentences, size=size,
            plan_size=plan_size, num_parts=num_parts, grad_projected_stride=grad_projected.stride(0),
            codebook_stride=_row_stride(codebook), weight_stride=_row_stride(weight),
        )  # fmt: skip
        return delta_parts, share_parts

    tiles = choose_tiles("projection_bwd", (size, plan_size), codebook, weight, grad_projected, mixture, trial=run)
    delta_parts, share_parts = run(tiles)
    if grads.oracle_weight is not None:
        if share_parts is None:
            grads.oracle_weight.zero_()
        else:
            grads.oracle_weight.copy_(share_parts.sum(1))
    return grad_mixture, delta_parts


def _mix_backward(
    arriving: _Arriving,
    planner: Planner,
    codebook: Tensor | None,
    share: Tensor | None,
    best: Tensor,
    statistics: Tensor,
    cut: Tensor,
    grads: _Gradients,
) -> None:
    """Fill the gradients of codebook, noise and the planner, chunk by chunk."""
    operand, size = (planner.source, 0) if codebook is None else (codebook, codebook.shape[1])
    sizes = (planner.num_actions, size)
    states = grad_logits = None
    if planner.head is not None and grads.of_logits:
        grad_logits = planner.source.new_empty(planner.num_sentences, planner.width)
        states = None if grads.source is None else torch.zeros_like(grads.source, dtype=torch.float32)
    elif grads.source is not None:
        grad_logits = grads.source
    for chunk in planner.chunks():
        outputs = (
            None if grad_logits is None else grad_logits[:, : chunk.logits.shape[1]],
            None if grads.noise is None else grads.noise[:, chunk.actions],
            None if grads.codebook is None or arriving.mixture is None else grads.codebook[chunk.actions],
        )
        actions = None if codebook is None else codebook[chunk.actions]
        run = partial(_mix_chunk_backward, arriving, planner, chunk, actions, share, best, statistics, cut, outputs)
        run(choose_tiles("mixture_bwd", sizes, operand, *planner.matrices, arriving.mixture, *outputs, trial=run))
        if planner.head is not None and outputs[0] is not None:
            _head_backward(planner, chunk, outputs[0], states, grads)
    if states is not None and grads.source is not None:
        grads.source.copy_(states)


def _mix_chunk_backward(
    arriving: _Arriving,
    planner: Planner,
    chunk: Chunk,
    actions: Tensor | None,
    share: Tensor | None,
    best: Tensor,
    statistics: Tensor,
    cut: Tensor,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    tiles: Tiles,
) -> None:
    grad_logits, grad_noise, grad_codebook = outputs
    num_sentences, num_actions = chunk.logits.shape
    size = 0 if actions is None else actions.shape[1]
    grid = 0
    if grad_codebook is not None:
        grid += triton.cdiv(num_actions, tiles.rows) * triton.cdiv(size, tiles.columns)
    if grad_logits is not None or grad_noise is not None:
        grid += triton.cdiv(num_sentences, tiles.rows) * triton.cdiv(num_actions, tiles.depth)
    parts = arriving.delta_parts
    launch(
        mixture_bwd_kernel, (grid,), tiles,
        reads=(*chunk.tensors, *arriving.tensors, statistics, cut if planner.top_k else None, planner.oracle, share,
               *((best, actions) if arriving.mixture is not None else ())),
        writes=outputs,
        **chunk.arguments(), grad_mixture=arriving.mixture, grad_log_normalizer=arriving.log_normalizer,
        grad_oracle_nll=arriving.oracle_nll, delta_parts=parts, statistics=statistics, cut=cut,
        oracle=planner.oracle, oracle_weight=share, best=best, codebook=actions, grad_logits=grad_logits,
        grad_noise=grad_noise, grad_codebook=grad_codebook, size=size, num_parts=0 if parts is None else parts.shape[2],
        inverse_temperature=1.0 / planner.temperature, grad_mixture_stride=_row_stride(arriving.mixture),
        grad_log_normalizer_stride=_row_stride(arriving.log_normalizer),
        grad_oracle_nll_stride=_row_stride(arriving.oracle_nll), codebook_stride=_row_stride(actions),
        grad_logits_stride=_row_stride(grad_logits), grad_noise_stride=_row_stride(grad_noise),
        TOP_K=planner.top_k > 0,
    )  # fmt: skip


def _head_backward(
    planner: Planner, chunk: Chunk, grad_logits: Tensor, states: Tensor | None, grads: _Gradients
) -> None:
    """What a chunk's logits pass on to the head and, added to `states`, to the hidden states."""
    assert planner.head is not None
    if states is not None:
        states += product(grad_logits, planner.head[chunk.actions], torch.empty_like(states))
    if grads.head is not None:
        product(grad_logits.T, planner.source, grads.head[chunk.actions])
    if grads.head_bias is not None:
        grads.head_bias[chunk.actions] = grad_logits.sum(0, dtype=torch.float32)


def _row_stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def _gathered_bytes(codebook: Tensor | None, share: Tensor | None) -> int | None:
    """Bytes of one codebook row for each sentence, where the oracle has a share."""
    return None if codebook is None or share is None else len(share) * codebook.shape[1] * codebook.element_size()
