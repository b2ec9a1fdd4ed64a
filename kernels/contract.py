"""What a backend's operators take and return: the fields of `plan_projection`'s schema by name.

Sizes: S sentences, K actions, A action-embedding size, D plan size (layers stacked), P planner state.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

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

    @property
    def num_actions(self) -> int:
        """K."""
        return self.source.shape[1] if self.head is None else self.head.shape[0]

    @property
    def size(self) -> int:
        """A; 0 without a codebook."""
        return 0 if self.codebook is None else self.codebook.shape[1]


class ProjectionGradients(NamedTuple):
    """What `plan_projection_backward` returns: gradients of the inputs of these names; None, or empty: not needed."""

    source: Tensor | None
    head: Tensor | None
    head_bias: Tensor | None
    codebook: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    noise: Tensor | None
    oracle_weight: Tensor | None


class ProjectionOutputs(NamedTuple):
    """What the operator `plan_projection` returns; from `best` on for its backward.

    Attributes:
        projected: `[S, D]` in the codebook's dtype.
        log_normalizer: `[S]`.
        oracle_nll: `[S]`.
        best: the action with the largest score, int64 `[S]`.
        mixture: `[S, A]`, before the oracle's embedding is mixed in.
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
