"""`plan_projection` on CUDA: which of its two forms runs, and the launches of the streamed one.

*Composed* (`triton_softmax`) writes the probabilities `[S, K]` once, in the products' dtype, and leaves all products to
the library. *Streamed* (`triton_mixture`) keeps them in registers: of `[S, K]` there is nothing but the logits, and
from hidden states those exist a chunk of actions at a time: `hidden @ head[chunk].T` by the library, in float32, into a
scratch that every chunk overwrites.

Sizes: S sentences, K actions, A action-embedding size, D plan size, P planner state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import triton_softmax
from .operators import ProjectionInputs, ProjectionNeeds, ProjectionOutputs, once, projection_outputs
from .triton_launch import Tiles, cdiv, choose_tiles, fastest, launch, num_processors, with_unit_columns
from .triton_mixture import (
    NUM_PARTIALS,
    codebook_bwd_kernel,
    combine_fwd_kernel,
    logits_bwd_kernel,
    mixture_fwd_kernel,
    sentences_bwd_kernel,
)
from .triton_softmax import find_threshold, mixture_backward, product_in_float32, projection_backward, scores_of

OPERATORS = ("plan_projection", "plan_projection_backward")
"""What this backend implements here; `operators` has the schemas."""

_SCRATCH_BYTES = 64 << 20
"""Of a chunk's logits: large enough for full-speed products (4096 sentences by 4096 actions), small beside a model."""

_SENTENCES, _COMBINED = Tiles(4, 256), Tiles(16, 128)


def is_streamed(inputs: ProjectionInputs, rule: bool) -> bool:
    """Whether the streamed form is to run: as measured on this device, elsewhere what the rule says."""
    if inputs.codebook is None or inputs.source.shape[0] == 0 or rule:
        return rule  # where memory decides there is nothing to measure
    sizes = (len(inputs.source), inputs.num_actions, inputs.size, 0 if inputs.weight is None else len(inputs.weight))
    name = f"plan_projection {'from logits' if inputs.head is None else 'from hidden'} | {inputs.codebook.dtype}"
    return fastest(name, sizes, inputs.source, (False, True), partial(_try, inputs))


def _try(inputs: ProjectionInputs, streamed: bool) -> None:
    """Forward and backward, as training runs them."""
    with torch.no_grad():
        inputs = inputs._replace(streamed=streamed)
        outputs = plan_projection(*inputs)
        needs = ProjectionNeeds(*(getattr(inputs, name) is not None for name in ProjectionNeeds._fields))
        plan_projection_backward(outputs.projected, None, None, *inputs[:9], *outputs[3:], *inputs[9:], needs)


def plan_projection(*arguments: Any) -> ProjectionOutputs:
    """Forward of `planlm.kernels.plan_projection` (soft selections) and what its backward needs.

    Args:
        *arguments: the fields of `ProjectionInputs`.
    """
    inputs = _laid_out(ProjectionInputs(*arguments))
    if not inputs.streamed:
        return triton_softmax.plan_projection(inputs)
    outputs = projection_outputs(*arguments)
    if inputs.source.shape[0] == 0:
        return outputs
    if inputs.top_k:
        find_threshold(inputs.top_k, outputs, partial(_scores, inputs))
    mix = partial(_mix, inputs, outputs)
    operand = inputs.source if inputs.codebook is None else inputs.codebook
    sizes = (inputs.num_actions, inputs.size)
    means, partials = mix(choose_tiles("mixture_fwd", sizes, operand, *_score_matrices(inputs), trial=mix))
    mixed = outputs.mixture if inputs.codebook is None else torch.empty_like(outputs.mixture, dtype=operand.dtype)
    tiles = _COMBINED if num_processors(operand.device) > 8 else Tiles(16, 16)
    launch(
        combine_fwd_kernel,
        (max(1, cdiv(inputs.size, tiles.columns)), cdiv(len(mixed), tiles.rows), 1), tiles,
        means=means, partials=partials, codebook=inputs.codebook, oracle=inputs.oracle,
        oracle_weight=inputs.oracle_weight, out_mixture=outputs.mixture, out_mixed=mixed,
        out_statistics=outputs.statistics, out_tie_index=outputs.tie_index, out_best=outputs.best,
        out_log_normalizer=outputs.log_normalizer, out_oracle_nll=outputs.oracle_nll, num_splits=len(partials),
        num_sentences=len(mixed), num_actions=inputs.num_actions, size=inputs.size,
        inverse_temperature=1.0 / inputs.temperature, TOP_K=bool(inputs.top_k), RAW=inputs.needs_raw,
    )  # fmt: skip
    if inputs.codebook is None:
        return outputs
    bias = None if inputs.bias is None else inputs.bias.to(mixed.dtype)
    if inputs.weight is None:
        return outputs._replace(projected=mixed if bias is None else mixed + bias)
    return outputs._replace(projected=F.linear(mixed, inputs.weight, bias))


def _laid_out(inputs: ProjectionInputs) -> ProjectionInputs:
    """The inputs as the kernels read them: adjacent columns, and weights of the oracle only where there is one."""
    codebook, weight, noise = inputs.codebook, inputs.weight, inputs.noise
    return inputs._replace(
        source=with_unit_columns(inputs.source),
        head_bias=_vector(inputs.head_bias),
        codebook=None if codebook is None else with_unit_columns(codebook),
        weight=None if weight is None else with_unit_columns(weight),
        bias=_vector(inputs.bias),
        noise=None if noise is None else with_unit_columns(noise),
        oracle=_vector(inputs.oracle),
        oracle_weight=None if inputs.oracle is None else _vector(inputs.oracle_weight),
    )


def _vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _score_matrices(inputs: ProjectionInputs) -> tuple[Tensor | None, Tensor | None]:
    """Those whose alignment decides how fast the scores can be read."""
    return inputs.source if inputs.head is None else None, inputs.noise


def _splits(inputs: ProjectionInputs, tiles: Tiles) -> tuple[int, int]:
    """Over how many programs the actions of a chunk are split, and how many actions each gets: a full device's."""
    busy = cdiv(len(inputs.source), tiles.rows) * max(1, cdiv(inputs.size, tiles.columns))
    steps = cdiv(_chunk_width(inputs), tiles.depth)
    wanted = min(max(num_processors(inputs.source.device) // busy, 1), steps)
    steps_each = cdiv(steps, wanted)
    return cdiv(steps, steps_each), steps_each * tiles.depth


def _mix(inputs: ProjectionInputs, outputs: ProjectionOutputs, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Means `[splits, S, A]` and partial statistics `[splits, NUM_PARTIALS, S]` of all actions."""
    num_sentences, size = outputs.mixture.shape
    num_splits, actions_per_split = _splits(inputs, tiles)
    partials, spare = outputs.statistics.new_empty(2, num_splits, NUM_PARTIALS.value, num_sentences)
    means = outputs.mixture.new_empty(num_splits, num_sentences, size)
    grid = (max(1, cdiv(size, tiles.columns)), cdiv(num_sentences, tiles.rows), num_splits)
    earlier: Tensor | None = None
    for first_action, chunk in _chunks(inputs):
        launch(
            mixture_fwd_kernel, grid, tiles, logits=chunk.source, head_bias=chunk.head_bias, noise=chunk.noise,
            statistics=outputs.statistics, tie_index=outputs.tie_index, oracle=chunk.oracle, codebook=chunk.codebook,
            earlier=earlier, out_means=means, out_partials=partials, num_sentences=num_sentences,
            num_actions=chunk.num_actions, size=size, first_action=first_action, actions_per_split=actions_per_split,
            inverse_temperature=1.0 / inputs.temperature, TOP_K=bool(inputs.top_k), RAW=inputs.needs_raw,
        )  # fmt: skip
        earlier, partials, spare = partials, spare, partials
    assert earlier is not None
    return means, earlier


def plan_projection_backward(*arguments: Any) -> list[Tensor]:
    """Gradients of the inputs that `ProjectionNeeds` names, in their dtypes; empty where they are not needed.

    Args:
        *arguments: gradients of projected, log_normalizer and oracle_nll (None: zero); the tensors of
            `ProjectionInputs`; `best`, `mixture`, `statistics` and `tie_index` of `ProjectionOutputs`; the rest of
            `ProjectionInputs`; which gradients are needed.
    """
    given = ProjectionInputs(*arguments[3:12], *arguments[16:19])
    inputs, needs = _laid_out(given), ProjectionNeeds(*arguments[19])
    saved = ProjectionOutputs(*arguments[:3], *arguments[12:16])
    upstream = list(arguments[:3])
    if upstream[0] is not None:
        upstream[0] = with_unit_columns(upstream[0])
    run = _streamed_backward if inputs.streamed else triton_softmax.plan_projection_backward
    found = run(upstream, inputs, saved, needs)

    def result(name: str, needed: bool) -> Tensor:
        if name in found:
            return found[name]
        value = getattr(given, name)
        if value is None or not needed:
            return given.source.new_empty(0)
        return torch.zeros_like(value, memory_format=torch.contiguous_format)  # nothing reaches it

    return [result(name, needed) for name, needed in zip(ProjectionNeeds._fields, needs, strict=True)]


def _streamed_backward(
    upstream: Sequence[Tensor | None], inputs: ProjectionInputs, saved: ProjectionOutputs, needs: ProjectionNeeds
) -> dict[str, Tensor]:
    """As `triton_softmax.plan_projection_backward`."""
    grad_mixture = mixture_backward(upstream[0], inputs, needs)
    mixed = products = None
    if needs.weight and inputs.weight is not None and upstream[0] is not None:
        mixed = torch.empty_like(saved.mixture, dtype=inputs.weight.dtype)
    if grad_mixture is not None or mixed is not None:
        products = _of_sentences(grad_mixture, inputs, saved, mixed, needs.oracle_weight)
    found = projection_backward(upstream[0], inputs, saved.mixture if mixed is None else mixed, needs)
    if grad_mixture is not None and products is not None:
        if needs.oracle_weight:
            found["oracle_weight"] = products[2].to(inputs.oracle_weight.dtype)
        if needs.codebook and inputs.codebook is not None:
            found["codebook"] = torch.empty_like(inputs.codebook)
    if inputs.source.shape[0] == 0 or not (needs.scores or "codebook" in found):
        return found
    if needs.noise and inputs.noise is not None:
        found["noise"] = torch.empty_like(inputs.noise)
    source, head = inputs.source, inputs.head
    grad_logits = states = None
    if needs.logits:
        grad_logits = source.new_empty(len(source), _chunk_width(inputs))
        if head is not None and needs.source:
            states = torch.zeros_like(source, dtype=torch.float32)
        if head is not None and needs.head:
            found["head"] = torch.empty_like(head, memory_format=torch.contiguous_format)
        if inputs.head_bias is not None and needs.head_bias:
            found["head_bias"] = torch.empty_like(inputs.head_bias)
    for first, chunk in _chunks(inputs):
        actions = slice(first, first + chunk.num_actions)
        of_chunk = None if grad_logits is None else grad_logits[:, : chunk.num_actions]
        given = {"grad_mixture": grad_mixture, "products": products, "grad_log_normalizer": upstream[1]}
        given["grad_oracle_nll"] = None if inputs.oracle is None else upstream[2]
        written = {"out_logits": of_chunk, "out_noise": found["noise"][:, actions] if "noise" in found else None}
        _chunk_backward(
            first, chunk, saved, given, written, found["codebook"][actions] if "codebook" in found else None
        )
        if head is None or of_chunk is None:
            continue
        if states is not None:
            states += product_in_float32(of_chunk, head[actions])
        if "head" in found:
            torch.mm(of_chunk.T, source, out=found["head"][actions])
        if "head_bias" in found:
            found["head_bias"][actions] = of_chunk.sum(0, dtype=torch.float32)
    if states is not None:
        found["source"] = states.to(source.dtype)
    elif head is None and grad_logits is not None:
        found["source"] = grad_logits
    return found


def _of_sentences(
    grad_mixture: Tensor | None, inputs: ProjectionInputs, saved: ProjectionOutputs, mixed: Tensor | None, weigh: bool
) -> Tensor:
    """Products of each sentence `[3, S]`, and the mixture with the oracle's embedding into `mixed`."""
    products = saved.mixture.new_empty(3, len(saved.mixture))
    tiles = _SENTENCES if num_processors(saved.mixture.device) > 8 else Tiles(4, 16)
    launch(
        sentences_bwd_kernel, (cdiv(len(saved.mixture), tiles.rows), 1, 1), tiles, grad_mixture=grad_mixture,
        mixture=saved.mixture, codebook=inputs.codebook, oracle=inputs.oracle, oracle_weight=inputs.oracle_weight,
        statistics=saved.statistics, best=saved.best, out_mixed=mixed, out_products=products,
        num_sentences=len(saved.mixture), num_actions=inputs.num_actions, size=inputs.size, TO_ORACLE_WEIGHT=weigh,
    )  # fmt: skip
    return products


def _chunk_backward(
    first_action: int,
    chunk: ProjectionInputs,
    saved: ProjectionOutputs,
    given: dict[str, Tensor | None],
    written: dict[str, Tensor | None],
    grad_codebook: Tensor | None,
) -> None:
    """Fill the gradients of logits, noise and codebook for a chunk of the actions."""
    operand = chunk.source if chunk.codebook is None else chunk.codebook
    common = {
        "grad_mixture": given["grad_mixture"], "logits": chunk.source, "head_bias": chunk.head_bias,
        "noise": chunk.noise, "statistics": saved.statistics, "tie_index": saved.tie_index, "oracle": chunk.oracle,
        "oracle_weight": chunk.oracle_weight, "num_sentences": len(chunk.source), "num_actions": chunk.num_actions,
        "size": chunk.size, "first_action": first_action, "inverse_temperature": 1.0 / chunk.temperature,
        "TOP_K": bool(chunk.top_k),
    }  # fmt: skip
    sizes = (chunk.num_actions, chunk.size)
    matrices = (*_score_matrices(chunk), given["grad_mixture"])
    if written["out_logits"] is not None or written["out_noise"] is not None:

        def to_logits(tiles: Tiles) -> None:
            grid = cdiv(len(chunk.source), tiles.rows) * cdiv(chunk.num_actions, tiles.depth)
            arguments = common | given | written
            launch(logits_bwd_kernel, (grid, 1, 1), tiles, **arguments, best=saved.best, codebook=chunk.codebook)

        to_logits(choose_tiles("logits_bwd", sizes, operand, *matrices, *written.values(), trial=to_logits))
    if grad_codebook is not None:

        def to_codebook(tiles: Tiles) -> None:
            grid = (cdiv(chunk.size, tiles.columns), cdiv(chunk.num_actions, tiles.rows), 1)
            launch(codebook_bwd_kernel, grid, tiles, **common, out_codebook=grad_codebook)

        to_codebook(choose_tiles("codebook_bwd", sizes, operand, *matrices, grad_codebook, trial=to_codebook))


def _chunk_width(inputs: ProjectionInputs) -> int:
    """Actions of a chunk: all from logits, from hidden states as many as the scratch holds.

    A quarter of them at most: both scratches of the backward together take fewer bytes than half-precision logits.
    """
    if inputs.head is None:
        return inputs.num_actions
    width = max(1, min(inputs.num_actions // 4, _SCRATCH_BYTES // (4 * len(inputs.source))))
    return width // 64 * 64 or width // 16 * 16 or width


def _chunks(inputs: ProjectionInputs) -> Iterator[tuple[int, ProjectionInputs]]:
    """All actions, in order: the first of each chunk, and its logits with what of the other inputs belongs to them.

    From hidden states every chunk overwrites the logits of the one before.
    """
    source, head, head_bias, noise = inputs.source, inputs.head, inputs.head_bias, inputs.noise
    if head is None:
        yield 0, inputs
        return
    width = _chunk_width(inputs)
    scratch = source.new_empty(len(source), width, dtype=torch.float32)
    for first in range(0, len(head), width):
        actions = slice(first, min(first + width, len(head)))
        logits = product_in_float32(source, head[actions].T, out=scratch[:, : actions.stop - first])
        yield (
            first,
            inputs._replace(
                source=logits,
                head=None,
                head_bias=None if head_bias is None else head_bias[actions],
                codebook=None if inputs.codebook is None else inputs.codebook[actions],
                noise=None if noise is None else noise[:, actions],
            ),
        )


def _scores(inputs: ProjectionInputs) -> Iterator[tuple[int, Tensor]]:
    """The scores of all actions, a chunk at a time, before the top k."""
    return ((first, scores_of(chunk.source, chunk.head_bias, chunk.noise)) for first, chunk in _chunks(inputs))


class PlanProjection(torch.autograd.Function):
    """The operator `plan_projection`, less what only its backward needs; differentiable once."""

    @staticmethod
    def forward(ctx: Any, temperature: float, top_k: int, streamed: bool, *tensors: Tensor | None) -> Any:
        outputs = plan_projection(*tensors, temperature, top_k, streamed)
        ctx.options = temperature, top_k, streamed
        ctx.save_for_backward(*tensors, *outputs[3:])
        ctx.mark_non_differentiable(outputs.best)
        ctx.set_materialize_grads(False)
        return outputs[:4]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        needs = [*needed[:7], needed[8]]  # the oracle's actions have no gradient
        found: list[Any] = plan_projection_backward(*upstream[:3], *ctx.saved_tensors, *ctx.options, needs)
        found = [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
        if torch.is_grad_enabled():
            sources = (*upstream[:3], *ctx.saved_tensors)
            found = [None if gradient is None else once(gradient, *sources) for gradient in found]
        return None, None, None, *found[:7], None, found[7]
