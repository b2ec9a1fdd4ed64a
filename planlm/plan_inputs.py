"""What the plans of a call of the joint model are made from: a part of every batch, and one argument of the model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


class Movable:
    """A dataclass of tensors, and of other such dataclasses."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with what `function` makes of each tensor, in the order of the fields."""
        made = {}
        for name, value in vars(self).items():
            inner = value.map(function) if isinstance(value, Movable) else value
            made[name] = function(value) if isinstance(value, Tensor) else inner
        return type(self)(**made)

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the fields."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found

    def to(self, device: torch.device | str) -> Self:
        """The same on `device`."""
        return self.map(lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class PlanInputs(Movable):
    """Segments of the windows, the sentences that they show, and what the planner sees of those.

    Sizes: B windows of W positions for the LM, R sequences of n positions for the planner, S segments (sentences as far
    as a window shows them), A dimensions of an embedding.

    Attributes:
        segment_ids: int64 `[B, W]`, segment of the sentence that holds the token after each position, -1 for none;
            sorted over the batch, -1 aside.
        segment_rows: int64 `[S, 2]`, sequence and position of each segment's sentence in `sentence_embeddings`.
        sentence_embeddings: `[R, n, A]`, at each position the embedding of the sentence before, 0 where there is none.
        sentence_positions: int64 `[R, n]`, number of the sentence in its document; by default each sequence is one
            document.
        actions: int64 `[S]`, the oracle actions, -1 for none.
        actions_ahead: int64 `[S, N - 1]`, oracle actions of the sentences after each, -1 for none; for a planner that
            predicts N.
        oracle_weight: of the oracle action in the mixture, 0 to 1; a number or `[S]`.
        shuffled_rows: int64 `[S, 2]`, as `segment_rows`, of the other document's sentence whose plan each segment gets
            under `shuffled`.
        action_bias: float32 `[K]`, nats added to the planner's logits, -inf for an action that is never to be chosen.
        action_noise: float32 `[S, K]`; where `actions` has none and `oracle_weight` is 1, the action is drawn: the one
            with the largest sum of this and the planner's logit.
        want_oracle_nll: run the planner for its cross-entropy even where the selection does not ask it.
        sentence_states: `[R, n, d]`, at each position the mean of the LM's states over the sentence before, 0 where
            there is none; for a planner that reads them, by default from the windows themselves. Then each window has
            a planner sequence of its own.
        segment_bounds: int32 `[S + 1]`, between which of all B W positions those of each segment lie, see
            `corpus.offsets`; where it is not given, kernels that want it find it.
        sentence_cu_seqlens: int32 `[N + 1]`, where in all R n positions documents begin, and padding, and the end;
            without it the planner's attention needs a mask on CUDA.
        sentence_longest: so many positions a document has there at most.
        most_segments: the largest number of segments in a window sequence, or more; where it is not given, it is looked
            up where it is needed, for which a host waits for a GPU.
    """

    segment_ids: Tensor
    segment_rows: Tensor
    sentence_embeddings: Tensor
    sentence_positions: Tensor | None = None
    actions: Tensor | None = None
    oracle_weight: float | Tensor = 0.0
    shuffled_rows: Tensor | None = None
    want_oracle_nll: bool = False
    action_bias: Tensor | None = None
    action_noise: Tensor | None = None
    sentence_states: Tensor | None = None
    actions_ahead: Tensor | None = None
    segment_bounds: Tensor | None = None
    sentence_cu_seqlens: Tensor | None = None
    sentence_longest: int = 0
    most_segments: int | None = None

    def replaced(self, **fields: Any) -> PlanInputs:
        """The same with other `fields`, and without the offsets and counts of what these replace."""
        stale: dict[str, Any] = {}
        if "segment_ids" in fields or "segment_rows" in fields:
            stale |= {"segment_bounds": None, "most_segments": None}
        if "sentence_embeddings" in fields or "sentence_positions" in fields:
            stale["sentence_cu_seqlens"] = None
        return dataclasses.replace(self, **stale | fields)


def shows_plan_inputs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Name the fields of `PlanInputs` in a signature: Trainer drops columns of a data set that it has no name for."""
    signature = inspect.signature(forward)
    *named, rest = signature.parameters.values()
    fields = [inspect.Parameter(name, rest.KEYWORD_ONLY, default=None) for name in PlanInputs.__dataclass_fields__]
    forward.__signature__ = signature.replace(parameters=[*named, *fields, rest])  # type: ignore[attr-defined]
    return forward
