"""`plan_projection` on CUDA: which kernels run on what, forward and backward, from logits or from hidden states.

Launches from logits: 2 forward (3 where the actions are split over programs), 2 backward. From hidden states the logits
exist a chunk of actions at a time: `hidden @ head[chunk].T` by the library, in float32, into a scratch that every chunk
overwrites. The first forward and the second backward kernel run once for each: the forward goes on from the state that
the chunks before have left, the backward computes each chunk anew.

Sizes: S sentences, K actions, A action-embedding size, D plan size, P planner state.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .contract import ProjectionGradients, ProjectionInputs, ProjectionOutputs, Statistic
from .operators import projection_outputs
from .triton_backward import mixture_bwd_kernel, projection_bwd_kernel
from .triton_forward import NUM_PARTIALS, combine_fwd_kernel, mixture_fwd_kernel, projection_fwd_kernel
from .triton_tiles import Tiles, choose_tiles, launch, num_processors, with_unit_columns

OPERATORS = ("plan_projection", "plan_projection_backward")
"""What this backend implements here; `operators` has the schemas."""

_SCRATCH_BYTES = 64 << 20
"""Of a chunk's logits: large enough for full-speed products (4096 sentences by 4096 actions), small beside a model."""


class _Saved(NamedTuple):
    """The fields of `ProjectionOutputs` that the backward works with."""

    best: Tensor
    mixture: Tensor
    statistics: Tensor
    tie_index: Tensor


def plan_projection(*arguments: Any) -> ProjectionOutputs:
    """Forward of `planlm.kernels.plan_projection` (soft selections) and what its backward needs.

    Args:
        *arguments: the fields of `ProjectionInputs`.
    """
    inputs, outputs = _laid_out(ProjectionInputs(*arguments)), projection_outputs(*arguments)
    if len(inputs.source) == 0:
        return outputs
    if inputs.top_k:
        _find_threshold(inputs, outputs)
    operand = inputs.source if inputs.codebook is None else inputs.codebook
    mix = partial(_mix, inputs, outputs)
    sizes = (inputs.num_actions, inputs.size)
    partials = mix(choose_tiles("mixture_fwd", sizes, operand, *_score_matrices(inputs), trial=mix))
    project = partial(_project, inputs, outputs, partials)
    sizes = (inputs.size, outputs.projected.shape[1])
    matrices = (inputs.weight, outputs.mixture, outputs.projected)
    project(choose_tiles("projection_fwd", sizes, operand, *matrices, trial=project))
    return outputs


def _laid_out(inputs: ProjectionInputs) -> ProjectionInputs:
    """The inputs as the kernels read them: adjacent columns, and weights of the oracle only where there is one."""
    tensors: dict[str, Any] = {
        name: with_unit_columns(value) if value.ndim == 2 else value.contiguous()
        for name, value in inputs._asdict().items()
        if isinstance(value, Tensor) and name != "head"
    }
    if inputs.oracle is None:
        tensors["oracle_weight"] = None
    return inputs._replace(**tensors)


def _score_matrices(inputs: ProjectionInputs) -> tuple[Tensor | None, Tensor | None]:
    """Those whose alignment decides how fast the scores can be read."""
    return inputs.source if inputs.head is None else None, inputs.noise


def _arguments(inputs: ProjectionInputs, first_action: int = 0) -> dict[str, Any]:
    """What the kernels take of the inputs, or of a chunk of them.

    RAW: the oracle's cross-entropy needs statistics other than those of the scores.
    """
    changed = inputs.noise is not None or bool(inputs.top_k) or inputs.temperature != 1.0
    return inputs._asdict() | {
        "logits": inputs.source,
        "num_sentences": len(inputs.source),
        "num_actions": inputs.num_actions,
        "size": inputs.size,
        "first_action": first_action,
        "inverse_temperature": 1.0 / inputs.temperature,
        "TOP_K": bool(inputs.top_k),
        "RAW": inputs.oracle is not None and changed,
    }


def _splits(inputs: ProjectionInputs, tiles: Tiles) -> tuple[int, int]:
    """Over how many programs the actions of a chunk are split, and how many actions each gets.

    As many as fill the device, but no more than keep the means of all splits, written once and read once in float32,
    below half the bytes that the kernel reads anyway.
    """
    source, codebook, size = inputs.source, inputs.codebook, inputs.size
    num_sentences = len(source)
    busy = triton.cdiv(num_sentences, tiles.rows) * max(1, triton.cdiv(size, tiles.columns))
    wanted = num_processors(source.device) // busy
    if codebook is not None and size > 0:
        logits_bytes = num_sentences * inputs.num_actions * source.element_size()
        codebook_bytes = codebook.numel() * codebook.element_size()
        wanted = min(wanted, (logits_bytes + codebook_bytes) // (16 * num_sentences * size))
    steps = triton.cdiv(_chunk_width(inputs), tiles.depth)
    steps_each = triton.cdiv(steps, min(max(wanted, 1), steps))
    return triton.cdiv(steps, steps_each), steps_each * tiles.depth


def _mix(inputs: ProjectionInputs, outputs: ProjectionOutputs, tiles: Tiles) -> Tensor:
    """Fill in the mixture. Returns the partial statistics `[splits, NUM_PARTIALS, S]`."""
    statistics, mixture = outputs.statistics, outputs.mixture
    num_sentences, size = mixture.shape
    num_splits, actions_per_split = _splits(inputs, tiles)
    partials, spare = statistics.new_empty(2, num_splits, NUM_PARTIALS.value, num_sentences)
    earlier = None
    means = mixture[None] if num_splits == 1 else mixture.new_empty(num_splits, num_sentences, size)
    grid = (max(1, triton.cdiv(size, tiles.columns)), triton.cdiv(num_sentences, tiles.rows), num_splits)
    kept = (statistics[Statistic.THRESHOLD], outputs.tie_index) if inputs.top_k else ()
    for actions, chunk in _chunks(inputs):
        before = () if earlier is None else (earlier, means)
        launch(
            mixture_fwd_kernel, grid, tiles,
            reads=(chunk.source, chunk.head_bias, chunk.noise, *kept, chunk.oracle, chunk.codebook, *before),
            writes=(partials, means),
            **_arguments(chunk, actions.start), **outputs._asdict(), means=means, earlier=earlier, partials=partials,
            actions_per_split=actions_per_split,
        )  # fmt: skip
        earlier, partials, spare = partials, spare, partials
    assert earlier is not None
    if num_splits > 1 and size > 0:
        tiles = choose_tiles("combine_fwd", (size,), means)
        launch(
            combine_fwd_kernel, (triton.cdiv(size, tiles.columns), triton.cdiv(num_sentences, tiles.rows)), tiles,
            reads=(means, earlier), writes=(mixture,),
            **_arguments(inputs), mixture=mixture, means=means, partials=earlier, num_splits=num_splits,
        )  # fmt: skip
    return earlier


def _project(inputs: ProjectionInputs, outputs: ProjectionOutputs, partials: Tensor, tiles: Tiles) -> None:
    """Fill in everything but the mixture."""
    num_sentences, plan_size = outputs.projected.shape
    oracle_weight = inputs.oracle_weight
    launch(
        projection_fwd_kernel,
        (max(1, triton.cdiv(plan_size, tiles.columns)), triton.cdiv(num_sentences, tiles.rows)), tiles,
        reads=(partials, outputs.mixture, inputs.weight, inputs.bias, inputs.oracle, oracle_weight,
               _gathered_bytes(inputs.codebook, oracle_weight)),
        writes=[value for name, value in outputs._asdict().items() if name != "mixture"],
        **_arguments(inputs), **outputs._asdict(), partials=partials, plan_size=plan_size, num_splits=len(partials),
    )  # fmt: skip


def plan_projection_backward(*arguments: Any) -> list[Tensor]:
    """Gradients of the inputs that `ProjectionGradients` names, in their dtypes; empty where they are not needed.

    Args:
        *arguments: gradients of projected, log_normalizer and oracle_nll (None: zero); the tensors of
            `ProjectionInputs`; `best`, `mixture`, `statistics` and `tie_index` of `ProjectionOutputs`; temperature and
            top_k; which gradients are needed.
    """
    grad_projected, grad_log_normalizer, grad_oracle_nll = arguments[:3]
    given = ProjectionInputs(*arguments[3:12], *arguments[16:18])
    inputs, saved = _laid_out(given), _Saved(*arguments[12:16])
    num_sentences = len(given.source)
    reaches_mixture = grad_projected is not None and given.codebook is not None and num_sentences > 0

    def room(name: str, needed: bool) -> Tensor | None:
        value = getattr(given, name)
        if value is None or not needed:
            return None
        unreached = name in ("codebook", "weight", "bias") and not reaches_mixture
        if unreached or name == "oracle_weight" or num_sentences == 0:
            return torch.zeros_like(value, memory_format=torch.contiguous_format)
        return torch.empty_like(value, memory_format=torch.contiguous_format)

    grads = ProjectionGradients(*map(room, ProjectionGradients._fields, arguments[18]))
    upstream = {
        "grad_mixture": None,
        "delta_partials": None,
        "grad_log_normalizer": grad_log_normalizer,
        "grad_oracle_nll": None if given.oracle is None else grad_oracle_nll,
    }
    if reaches_mixture:
        upstream |= _project_backward(with_unit_columns(grad_projected), inputs, saved, grads)
    if num_sentences > 0 and (_to_scores(grads) or (grads.codebook is not None and reaches_mixture)):
        _mix_backward(upstream, inputs, saved, grads)
    return [given.source.new_empty(0) if gradient is None else gradient for gradient in grads]


def _to_logits(grads: ProjectionGradients) -> bool:
    """Whether a gradient of the logits is needed: theirs, or one of what they come from."""
    return grads.source is not None or grads.head is not None or grads.head_bias is not None


def _to_scores(grads: ProjectionGradients) -> bool:
    """The same of the scores."""
    return _to_logits(grads) or grads.noise is not None


def _project_backward(
    grad_projected: Tensor, inputs: ProjectionInputs, saved: _Saved, grads: ProjectionGradients
) -> dict[str, Tensor]:
    """Fill the gradients of weight, bias and oracle_weight.

    Returns `grad_mixture [S, A]` and `delta_partials [2 or 3, S, tiles of A]`: of its products with the mixture, with
    the likeliest action's embedding less the mixture and, for the gradient of oracle_weight, with the oracle's.
    """
    codebook, weight, oracle, oracle_weight = inputs.codebook, inputs.weight, inputs.oracle, inputs.oracle_weight
    best, mixture = saved.best, saved.mixture
    assert codebook is not None
    (num_sentences, size), plan_size = mixture.shape, grad_projected.shape[1]
    grad_mixture = grad_projected if weight is None else torch.empty_like(mixture, dtype=codebook.dtype)
    to_mixture = _to_scores(grads) or grads.codebook is not None or grads.oracle_weight is not None
    to_oracle_weight = oracle_weight is not None and grads.oracle_weight is not None
    mixed_weight = None if grads.weight is None else oracle_weight

    def run(tiles: Tiles) -> Tensor:
        num_tiles = triton.cdiv(size, tiles.columns)
        num_partials = num_tiles if to_mixture else 0
        delta_partials = mixture.new_empty(3 if to_oracle_weight else 2, num_sentences, num_partials)
        grid = triton.cdiv(num_sentences, tiles.rows) * num_partials
        if grads.weight is not None:
            grid += triton.cdiv(plan_size, tiles.rows) * num_tiles
        if grads.bias is not None:
            grid += triton.cdiv(plan_size, tiles.columns)
        launch(
            projection_bwd_kernel, (grid,), tiles,
            reads=(grad_projected, mixture, weight if to_mixture else None, oracle, mixed_weight,
                   *((best, _gathered_bytes(codebook, best)) if to_mixture else ()),
                   _gathered_bytes(codebook, oracle_weight if to_oracle_weight else mixed_weight)),
            writes=(grad_mixture if to_mixture and weight is not None else None, grads.weight, grads.bias,
                    delta_partials),
            **_arguments(inputs), **saved._asdict(), grad_projected=grad_projected, grad_mixture=grad_mixture,
            grad_weight=grads.weight, grad_bias=grads.bias, delta_partials=delta_partials, plan_size=plan_size,
            num_partials=num_partials, TO_ORACLE_WEIGHT=to_oracle_weight,
        )  # fmt: skip
        return delta_partials

    matrices = (codebook, weight, grad_projected, mixture)
    delta_partials = run(choose_tiles("projection_bwd", (size, plan_size), *matrices, trial=run))
    if to_oracle_weight and grads.oracle_weight is not None:
        grads.oracle_weight.copy_(delta_partials[2].sum(1))
    return {"grad_mixture": grad_mixture, "delta_partials": delta_partials}


def _mix_backward(
    upstream: dict[str, Tensor | None], inputs: ProjectionInputs, saved: _Saved, grads: ProjectionGradients
) -> None:
    """Fill the gradients of codebook, noise and what the logits come from, chunk by chunk; states': summed up."""
    source, codebook = inputs.source, inputs.codebook
    states = grad_logits = None
    if inputs.head is None:
        grad_logits = grads.source
    elif _to_logits(grads):
        grad_logits = source.new_empty(len(source), _chunk_width(inputs))
        states = None if grads.source is None else torch.zeros_like(grads.source, dtype=torch.float32)
    operand, sizes = source if codebook is None else codebook, (inputs.num_actions, inputs.size)
    grad_mixture = upstream["grad_mixture"]
    for actions, chunk in _chunks(inputs):
        written = {
            "grad_logits": None if grad_logits is None else grad_logits[:, : chunk.num_actions],
            "grad_noise": None if grads.noise is None else grads.noise[:, actions],
            "grad_codebook": None if grads.codebook is None or grad_mixture is None else grads.codebook[actions],
        }
        run = partial(_mix_chunk_backward, upstream, actions, chunk, saved, written)
        matrices = (*_score_matrices(inputs), grad_mixture, *written.values())
        run(choose_tiles("mixture_bwd", sizes, operand, *matrices, trial=run))
        of_logits = written["grad_logits"]
        if inputs.head is None or of_logits is None:
            continue
        if states is not None:
            states += _product(of_logits, inputs.head[actions], torch.empty_like(states))
        if grads.head is not None:
            _product(of_logits.T, source, grads.head[actions])
        if grads.head_bias is not None:
            grads.head_bias[actions] = of_logits.sum(0, dtype=torch.float32)
    if states is not None and grads.source is not None:
        grads.source.copy_(states)


def _mix_chunk_backward(
    upstream: dict[str, Tensor | None],
    actions: slice,
    chunk: ProjectionInputs,
    saved: _Saved,
    written: dict[str, Tensor | None],
    tiles: Tiles,
) -> None:
    num_sentences, num_actions = chunk.source.shape
    grid = 0
    if written["grad_codebook"] is not None:
        grid += triton.cdiv(num_actions, tiles.rows) * triton.cdiv(chunk.size, tiles.columns)
    if written["grad_logits"] is not None or written["grad_noise"] is not None:
        grid += triton.cdiv(num_sentences, tiles.rows) * triton.cdiv(num_actions, tiles.depth)
    delta_partials = upstream["delta_partials"]
    launch(
        mixture_bwd_kernel, (grid,), tiles,
        reads=(chunk.source, chunk.head_bias, chunk.noise, *upstream.values(), saved.statistics,
               saved.tie_index if chunk.top_k else None, chunk.oracle, chunk.oracle_weight,
               *(() if delta_partials is None else (saved.best, chunk.codebook))),
        writes=tuple(written.values()),
        **_arguments(chunk, actions.start), **saved._asdict(), **upstream, **written,
        num_partials=0 if delta_partials is None else delta_partials.shape[2],
    )  # fmt: skip


def _gathered_bytes(codebook: Tensor | None, per_sentence: Tensor | None) -> int | None:
    """Bytes of one row of the codebook for each sentence, where the oracle has a weight."""
    if codebook is None or per_sentence is None:
        return None
    return len(per_sentence) * codebook.shape[1] * codebook.element_size()


def _chunk_width(inputs: ProjectionInputs) -> int:
    """Actions of a chunk: all from logits, from hidden states as many as the scratch holds.

    A quarter of them at most: both scratches of the backward together take fewer bytes than half-precision logits.
    """
    if inputs.head is None:
        return inputs.num_actions
    width = max(1, min(inputs.num_actions // 4, _SCRATCH_BYTES // (4 * len(inputs.source))))
    return width // 64 * 64 or width // 16 * 16 or width


def _chunks(inputs: ProjectionInputs) -> Iterator[tuple[slice, ProjectionInputs]]:
    """All actions, in order: which ones, and their logits with what of the other inputs belongs to them.

    From hidden states every chunk overwrites the logits of the one before.
    """
    source, head, head_bias, noise = inputs.source, inputs.head, inputs.head_bias, inputs.noise
    if head is None:
        yield slice(0, inputs.num_actions), inputs
        return
    width = _chunk_width(inputs)
    scratch = source.new_empty(len(source), width, dtype=torch.float32)
    for first in range(0, len(head), width):
        actions = slice(first, min(first + width, len(head)))
        logits = scratch[:, : actions.stop - first]
        _product(source, head[actions].T, logits)
        yield (
            actions,
            inputs._replace(
                source=logits,
                head=None,
                head_bias=None if head_bias is None else head_bias[actions],
                codebook=None if inputs.codebook is None else inputs.codebook[actions],
                noise=None if noise is None else noise[:, actions],
            ),
        )


def _find_threshold(inputs: ProjectionInputs, outputs: ProjectionOutputs) -> None:
    """The lowest score that the top k keeps, and the last of its equals kept, into statistics and tie_index.

    Candidates of the chunks so far come before those of the next and sorting is stable: among equals the lowest index.
    """
    values = indices = None
    for actions, chunk in _chunks(inputs):
        scores = chunk.source.float()  # bit for bit what the kernels compute
        if chunk.head_bias is not None:
            scores = scores + chunk.head_bias.float()
        if chunk.noise is not None:
            scores = scores + chunk.noise.float()
        best, order = torch.sort(scores, dim=1, descending=True, stable=True)
        best, order = best[:, : inputs.top_k], order[:, : inputs.top_k] + actions.start
        if values is None or indices is None:
            values, indices = best, order
            continue
        indices = torch.cat([indices, order], dim=1)
        values, order = torch.sort(torch.cat([values, best], dim=1), dim=1, descending=True, stable=True)
        values = values[:, : inputs.top_k]
        indices = indices.gather(1, order[:, : inputs.top_k])
    assert values is not None and indices is not None
    outputs.statistics[Statistic.THRESHOLD].copy_(values[:, -1])
    outputs.tie_index.copy_(indices[:, -1])


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`left @ right` into `out`: summed in float32, and rounded only where `out` is of half precision."""
    if left.dtype == out.dtype and not left.is_cpu:
        return torch.mm(left, right, out=out)
    if left.is_cpu:  # the interpreter: no product of the library's here gives float32 for half-precision operands
        return out.copy_(left.float() @ right.float())
    return torch.mm(left, right, out_dtype=torch.float32, out=out)
