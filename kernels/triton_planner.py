"""Where the scores of `plan_projection` come from on CUDA: logits, or hidden states and the planner's head.

From hidden states the logits exist a chunk of actions at a time: `hidden @ head[chunk].T` by the library, in float32,
into a scratch that every chunk overwrites.

Sizes: S sentences, K actions, C actions of a chunk, P planner state.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .contract import ProjectionInputs, ProjectionOutputs, Statistic

_SCRATCH_BYTES = 64 << 20
"""Of a chunk's logits: large enough for full-speed products (4096 sentences by 4096 actions), small beside a model."""


def chunk_width(inputs: ProjectionInputs) -> int:
    """Actions of a chunk: all from logits, from hidden states as many as the scratch holds.

    A quarter of them at most: both scratches of the backward together take fewer bytes than half-precision logits.
    """
    if inputs.head is None:
        return inputs.num_actions
    width = max(1, min(inputs.num_actions // 4, _SCRATCH_BYTES // (4 * len(inputs.source))))
    return width // 64 * 64 or width // 16 * 16 or width


def chunks(inputs: ProjectionInputs) -> Iterator[tuple[slice, ProjectionInputs]]:
    """All actions, in order: which ones, and their logits with what of the other inputs belongs to them.

    From hidden states every chunk overwrites the logits of the one before.
    """
    source, head, head_bias, noise = inputs.source, inputs.head, inputs.head_bias, inputs.noise
    if head is None:
        yield slice(0, inputs.num_actions), inputs
        return
    width = chunk_width(inputs)
    scratch = source.new_empty(len(source), width, dtype=torch.float32)
    for first in range(0, len(head), width):
        actions = slice(first, min(first + width, len(head)))
        logits = scratch[:, : actions.stop - first]
        product(source, head[actions].T, logits)
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


def find_threshold(inputs: ProjectionInputs, outputs: ProjectionOutputs) -> None:
    """The lowest score that the top k keeps, and the last of its equals kept, into statistics and tie_index.

    Candidates of the chunks so far come before those of the next and sorting is stable: among equals the lowest index.
    """
    values = indices = None
    for actions, chunk in chunks(inputs):
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


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`left @ right` into `out`: summed in float32, and rounded only where `out` is of half precision."""
    if left.dtype == out.dtype and not left.is_cpu:
        return torch.mm(left, right, out=out)
    if left.is_cpu:  # the interpreter: no product of the library's here gives float32 for half-precision operands
        return out.copy_(left.float() @ right.float())
    return torch.mm(left, right, out_dtype=torch.float32, out=out)
