"""What a backend's operators take and return: the fields of `plan_projection`'s schema by name.

Sizes: S sentences, K actions, A action-embedding size, D plan size (layers stacked), P planner state.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ProjectionInputs(NamedTuple):
    """The arguments of the operator `plan_projection`, in its order; those of the public functions, less the selection.

    Attributes:
        source: logits `[S, K]`, or with a head the planner's states `[S, P]`.
        head: `[K, P]`.
        head_bias: `[K]`.
        codebook: `[K, A]`; None: only the statistics are wanted.
        weight: `[D, A]`; None: the mixture itself is projected, D = A.
        bias: `[D]`.
        noise: `[S, K]`, added to the logits.
        oracle: int64 `[S]`; negative: none.
        oracle_weight: `[S]`, or None for 0; in the public functions `[S]` or a number.
        temperature: divides the scores.
        top_k: scores kept; 0, or None in the public functions: all.
        streamed: the form that runs on CUDA, True on a CPU; no argument of the public functions.
    """

    source: Tensor
    head: Tensor | None
    head_bias: Tensor | None
    codebook: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    noise: Tensor | None
    oracle: Tensor | None
    oracle_weight: Any
    temperature: float
    top_k: int | None
    streamed: bool = False

    @property
    def num_actions(self) -> int:
        """K."""
        return self.source.shape[1] if self.head is None else self.head.shape[0]

    @property
    def size(self) -> int:
        """A; 0 without a codebook."""
        return 0 if self.codebook is None else self.codebook.shape[1]

    @property
    def needs_raw(self) -> bool:
        """Whether the oracle's cross-entropy needs statistics other than those of the scores."""
        changed = self.noise is not None or bool(self.top_k) or self.temperature != 1.0
        return self.oracle is not None and changed


class ProjectionNeeds(NamedTuple):
    """Of which inputs `plan_projection_backward` returns the gradient; it returns them in this order."""

    source: bool
    head: bool
    head_bias: bool
    codebook: bool
    weight: bool
    bias: bool
    noise: bool
    oracle_weight: bool

    @property
    def logits(self) -> bool:
        """Whether a gradient of the logits is: theirs, or one of what they come from."""
        return self.source or self.head or self.head_bias

    @property
    def scores(self) -> bool:
        """The same of the scores."""
        return self.logits or self.noise


class ProjectionOutputs(NamedTuple):
    """What the operator `plan_projection` returns; from `best` on for its backward.

    Attributes:
        projected: `[S, D]` in the codebook's dtype.
        log_normalizer: `[S]`.
        oracle_nll: `[S]`.
        best: the action with the largest score, int64 `[S]`.
        mixture: `[S, A]`. Of the CPU and the streamed form before the oracle's embedding is mixed in; of the composed
            form after that, in the codebook's dtype.
        statistics: `[5, S]`, rows of `Statistic`.
        tie_index: the last action that top-k keeps among those equal to the threshold, int64 `[S]`.
    """

    projected: Tensor
    log_normalizer: Tensor
    oracle_nll: Tensor
    best: Tensor
    mixture: Tensor
    statistics: Tensor
    tie_index: Tensor


class Statistic(IntEnum):
    """Rows of `statistics`; those of the logits, without noise and temperature, only where there is an oracle."""

    SCORE_MAX = 0
    SCORE_LOG_SUM = 1  # log of the sum of exp((score - SCORE_MAX) / temperature)
    LOGIT_MAX = 2
    LOGIT_LOG_SUM = 3
    THRESHOLD = 4  # the lowest score that top-k keeps


def projection_outputs(*arguments: Any) -> ProjectionOutputs:
    """Room for what `plan_projection` returns."""
    inputs = ProjectionInputs(*arguments)
    source, codebook, weight = inputs.source, inputs.codebook, inputs.weight
    num_sentences, plan_size = source.shape[0], inputs.size if weight is None else weight.shape[0]
    working = torch.float64 if source.dtype == torch.float64 else torch.float32
    real, whole = source.new_empty(0, dtype=working), source.new_empty(0, dtype=torch.int64)
    result = working if codebook is None else codebook.dtype
    return ProjectionOutputs(
        projected=source.new_empty(num_sentences, plan_size, dtype=result),
        log_normalizer=real.new_empty(num_sentences),
        oracle_nll=real.new_empty(num_sentences),
        best=whole.new_empty(num_sentences),
        mixture=source.new_empty(num_sentences, inputs.size, dtype=working if inputs.streamed else result),
        statistics=real.new_empty(len(Statistic), num_sentences),
        tie_index=whole.new_empty(num_sentences),
    )
