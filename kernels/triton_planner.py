"""Where the scores of `plan_projection` come from on CUDA: logits, or hidden states and the planner's head.

From hidden states the logits exist a chunk of actions at a time: `hidden @ head[chunk].T` by the library, in float32,
into a scratch that every chunk overwrites.

Sizes: S sentences, K actions, C actions of a chunk, P planner state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .triton_tiles import with_unit_columns

_SCRATCH_BYTES = 64 << 20
"""Of a chunk's logits: large enough for full-speed products (4096 sentences by 4096 actions), small beside a model."""


@dataclass(frozen=True)
class Chunk:
    """Some actions' logits `[S, C]`, from action `first` on, with the parts of bias and noise that belong to them."""

    first: int
    logits: Tensor
    head_bias: Tensor | None
    noise: Tensor | None

    @property
    def actions(self) -> slice:
        """Where its actions stand among all."""
        return slice(self.first, self.first + self.logits.shape[1])

    def arguments(self) -> dict[str, Any]:
        """What every kernel takes of it."""
        return {
            "logits": self.logits,
            "head_bias": self.head_bias,
            "noise": self.noise,
            "num_rows": self.logits.shape[0],
            "num_columns": self.logits.shape[1],
            "first_column": self.first,
            "logits_stride": self.logits.stride(0),
            "noise_stride": 0 if self.noise is None else self.noise.stride(0),
        }

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a kernel reads of it."""
        return self.logits, self.head_bias, self.noise

    def scores(self) -> Tensor:
        """Bit for bit what the kernels compute."""
        scores = self.logits.float()
        if self.head_bias is not None:
            scores = scores + self.head_bias.float()
        return scores if self.noise is None else scores + self.noise.float()


@dataclass(frozen=True)
class Planner:
    """Where the scores come from and what is done with them."""

    source: Tensor
    head: Tensor | None
    head_bias: Tensor | None
    noise: Tensor | None
    oracle: Tensor | None
    temperature: float
    top_k: int

    @property
    def num_sentences(self) -> int:
        """S."""
        return self.source.shape[0]

    @property
    def num_actions(self) -> int:
        """K."""
        return self.source.shape[1] if self.head is None else self.head.shape[0]

    @property
    def raw(self) -> bool:
        """Whether the oracle's cross-entropy needs statistics other than those of the scores."""
        changed = self.noise is not None or self.top_k > 0 or self.temperature != 1.0
        return self.oracle is not None and changed

    @property
    def matrices(self) -> tuple[Tensor | None, ...]:
        """Those whose alignment decides how fast the scores can be read."""
        return self.source if self.head is None else None, self.noise

    @property
    def width(self) -> int:
        """Actions of a chunk: all from logits, from hidden states as many as the scratch holds.

        A quarter of them at most: both scratches of the backward together take fewer bytes than half-precision logits.
        """
        if self.head is None:
            return self.num_actions
        width = max(1, min(self.num_actions // 4, _SCRATCH_BYTES // (4 * self.num_sentences)))
        return width // 64 * 64 or width // 16 * 16 or width

    def chunks(self) -> Iterator[Chunk]:
        """All actions, in order. From hidden states every chunk overwrites the logits of the one before."""
        if self.head is None:
            yield Chunk(0, self.source, None, self.noise)
            return
        scratch = self.source.new_empty(self.num_sentences, self.width, dtype=torch.float32)
        for first in range(0, self.num_actions, self.width):
            end = min(first + self.width, self.num_actions)
            logits = scratch[:, : end - first]
            product(self.source, self.head[first:end].T, logits)
            yield Chunk(
                first,
                logits,
                None if self.head_bias is None else self.head_bias[first:end],
                None if self.noise is None else self.noise[:, first:end],
            )


def make_planner(
    source: Tensor,
    head: Tensor | None,
    head_bias: Tensor | None,
    noise: Tensor | None,
    oracle: Tensor | None,
    temperature: float,
    top_k: int,
) -> Planner:
    """The scores of checked arguments, in the layout that the kernels read."""
    head_bias = None if head_bias is None else head_bias.contiguous()
    oracle = None if oracle is None else oracle.contiguous()
    return Planner(with_unit_columns(source), head, head_bias, dense(noise), oracle, temperature, top_k)


def dense(matrix: Tensor | None) -> Tensor | None:
    """`with_unit_columns` of a tensor that may be missing."""
    return None if matrix is None else with_unit_columns(matrix)


def find_threshold(planner: Planner, statistics: Tensor, cut: Tensor) -> None:
    """The lowest score that the top k keeps, into `statistics[4]`, and the last of its equals kept, into `cut`.

    Candidates of the chunks so far come before those of the next and sorting is stable: among equals the lowest index.
    """
    values = indices = None
    for chunk in planner.chunks():
        best, actions = torch.sort(chunk.scores(), dim=1, descending=True, stable=True)
        best, actions = best[:, : planner.top_k], actions[:, : planner.top_k] + chunk.first
        if values is None or indices is None:
            values, indices = best, actions
            continue
        values, order = torch.sort(torch.cat([values, best], dim=1), dim=1, descending=True, stable=True)
        values = values[:, : planner.top_k]
        indices = torch.cat([indices, actions], dim=1).gather(1, order[:, : planner.top_k])
    assert values is not None and indices is not None
    statistics[4].copy_(values[:, -1])
    cut.copy_(indices[:, -1])


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`left @ right` into `out`: summed in float32, and rounded only where `out` is of half precision."""
    if left.dtype == out.dtype and not left.is_cpu:
        return torch.mm(left, right, out=out)
    if left.is_cpu:  # the interpreter: no product of the library's here gives float32 for half-precision operands
        return out.copy_(left.float() @ right.float())
    return torch.mm(left, right, out_dtype=torch.float32, out=out)
