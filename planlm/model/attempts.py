"""Sentences that carry the action asked for: each is written several times, and the first that does is kept.

That is rejection sampling: a sentence kept because it carries its action is a draw from the model's distribution over
such sentences. Where none does, the one nearest to the action is kept. A sentence carries the action whose centroid is
nearest to its embedding, as in preparation.

Sizes: B texts, R rows of a batch (the attempts at each text side by side), K actions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import StoppingCriteria, StopStringCriteria

from planlm.config import EvaluateGenerationConfig, GenerateConfig
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.sampling import SharedGumbel, left_padded, sampled
from planlm.model.tracking import SentenceTracker, TrackedText, centroid_distances


class GrowingTracker(SentenceTracker):
    """A tracker that one `generate()` after the other goes on with: only the first one's texts are its prompts.

    Attributes:
        rows: of each row of the batch the number of its prompt; empty: as in `SentenceTracker`.
    """

    rows: Sequence[int] = ()

    def start(self, input_ids: Tensor, real: Tensor | None = None, positions: Tensor | None = None) -> None:
        """Take these texts for prompts, unless there are some."""
        if not self._prompts:
            super().start(input_ids, real, positions)

    def _prompt(self, tokens: list[int], number: int, count: int) -> Any:
        return self._prompts[self.rows[number]] if self.rows else super()._prompt(tokens, number, count)


@dataclass
class _Text:
    """A text while it is written: its number, its tokens, how many are its prompt's, and how many it has room for."""

    number: int
    ids: list[int]
    begin: int
    room: int


def write(
    model: PlanLMForCausalLM,
    prompts: Sequence[list[int]],
    keys: Sequence[tuple[int, int]],
    tracker: GrowingTracker,
    config: GenerateConfig | EvaluateGenerationConfig,
    step: Callable[[int], None],
    **settings: Any,
) -> list[list[int]]:
    """Continue texts, each sentence of an action that is forced or drawn in `config.attempts` attempts at once.

    Args:
        model: the joint model, with its encoder and centroids.
        prompts: tokens of the B texts.
        keys: of their noise, as of `SharedGumbel`; first attempts have that of texts without attempts.
        tracker: with the actions asked for.
        config: attempts, length, sampling and seed.
        step: called with the number of tokens that were kept.
        settings: further keywords of `generate()`, `pad_token_id` among them.

    Returns:
        New tokens of each text, up to its end token or stop string.
    """
    centroids, padding = model.centroids.numpy(), settings["pad_token_id"]
    context = model.lm.config.max_position_embeddings
    ids, mask = left_padded(prompts, padding, torch.device("cpu"))
    tracker.start(ids, mask.bool())
    texts = [_Text(at, list(ids), len(ids), config.max_new_tokens) for at, ids in enumerate(prompts)]
    first = [len(_track(tracker, text, text.ids).sentences) for text in texts]
    while going := [text for text in texts if text.room]:
        before = [_track(tracker, text, text.ids) for text in going]
        # Of each open sentence, its number behind the one that the prompt leaves open.
        numbers = [len(one.sentences) - first[text.number] for text, one in zip(going, before, strict=True)]
        counts = [
            config.attempts if tracker.asks(at, text.number) else 1 for text, at in zip(going, numbers, strict=True)
        ]
        owners = np.repeat(np.arange(len(going)), counts).tolist()
        ids, mask = left_padded([going[owner].ids for owner in owners], padding, model.device)
        until = [  # behind the last sentence that is asked for a text goes on to its end
            len(one.finished) if tracker.asks_from(at, text.number) else None
            for text, at, one in zip(going, numbers, before, strict=True)
        ]
        tracker.rows = [going[owner].number for owner in owners]
        ends = _Ends(model, tracker, [going[owner] for owner in owners], [until[owner] for owner in owners], settings)
        written = [len(text.ids) - text.begin for text in going]
        noise = SharedGumbel(config.seed, [keys[text.number] for text in going], ids.shape[1], None, written, counts)
        model.generate(
            ids,
            attention_mask=mask,
            tracker=tracker,
            # Rows that have ended are filled up until the last one has, and an LM has no positions behind its context.
            max_new_tokens=min(max(text.room for text in going), context - ids.shape[1]),
            logits_processor=sampled(model.generation_config, config.temperature, config.top_p, noise),
            stopping_criteria=[ends],
            do_sample=False,
            **settings,
        )
        for at, text in enumerate(going):
            own = [row for row, owner in enumerate(owners) if owner == at]
            kept = own[_chosen(tracker, text, ends, own, len(before[at].finished), numbers[at], centroids)]
            text.ids += ends.found[kept]
            text.room = 0 if ends.is_text_over[kept] else text.room - len(ends.found[kept])
            step(len(ends.found[kept]))
    tracker.rows = range(len(texts))
    return [text.ids[text.begin :] for text in texts]


def _track(tracker: GrowingTracker, text: _Text, ids: list[int]) -> TrackedText:
    tracker.rows = [text.number]
    return tracker.track(ids)


def _chosen(
    tracker: GrowingTracker,
    text: _Text,
    ends: _Ends,
    rows: Sequence[int],
    sentence: int,
    number: int,
    centroids: NDArray[np.float32],
) -> int:
    """Number of the attempt to keep.

    Where an action was drawn and the first attempt ends the text instead, the text ends: nobody asked for more.

    Args:
        tracker: what knows the action.
        text: what was continued.
        ends: what was written.
        rows: the attempts, of the batch.
        sentence: where theirs stands among the text's finished ones.
        number: of it behind the one that the prompt leaves open.
        centroids: `[K, A]`.
    """
    tried = [_track(tracker, text, text.ids + ends.found[row]) for row in rows]
    action = tracker.forced(number, text.number)
    if action < 0:
        if ends.is_text_over[rows[0]]:
            return 0
        action = tracker.drawn(number, text.number, tried[0].finished[sentence - 1].logits)
    return _best(tried, sentence, action, centroids)


def _best(tried: Sequence[TrackedText], sentence: int, action: int, centroids: NDArray[np.float32]) -> int:
    """Number of the first attempt whose sentence carries the action, else, of those that are whole, of the nearest."""
    nearest = (np.inf, 0)
    for at, one in enumerate(tried):
        if action >= 0 and len(one.finished) > sentence:
            distances = centroid_distances(one.finished[sentence].embedding, centroids)
            if distances.argmin() == action:
                return at
            nearest = min(nearest, (float(distances[action]), at))
    return nearest[1]


class _Ends(StoppingCriteria):  # type: ignore[misc]
    """Ends a row where its sentence does, at an end token or stop string, or where its text has no more room.

    Attributes:
        found: new tokens of each row.
        is_text_over: whether a row ended at an end token or stop string.
        eos_token_id: transformers fills up rows that have ended only where a criterion has this attribute.
    """

    eos_token_id = None

    def __init__(
        self,
        model: PlanLMForCausalLM,
        tracker: GrowingTracker,
        texts: Sequence[_Text],
        until: Sequence[int | None],
        settings: Mapping[str, Any],
    ) -> None:
        """Take the text of each row, and how many finished sentences are too few; None: it goes on to its end."""
        end, stop = model.generation_config.eos_token_id, model.generation_config.stop_strings
        self._ends = set(end) if isinstance(end, list) else {end}
        self._stops = StopStringCriteria(settings["tokenizer"], stop) if stop else None
        self._tracker, self._texts, self._until = tracker, texts, until
        self._width = max(len(text.ids) for text in texts)
        self._is_over = [False] * len(texts)
        self.found: list[list[int]] = [[] for _ in texts]
        self.is_text_over = [False] * len(texts)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows have ended, bool `[R]`."""
        stops = [False] * len(self.found) if self._stops is None else self._stops(input_ids, scores).tolist()
        for at, new in enumerate(input_ids[:, self._width :].tolist()):
            if not self._is_over[at]:
                self.found[at] = new
                self.is_text_over[at] = new[-1] in self._ends or stops[at]
                is_full = len(new) >= self._texts[at].room
                self._is_over[at] = self.is_text_over[at] or is_full or self._has_sentence(at)
        return torch.tensor(self._is_over, device=input_ids.device)

    def _has_sentence(self, at: int) -> bool:
        enough, ids = self._until[at], self._texts[at].ids + self.found[at]
        return enough is not None and len(self._tracker.track(ids, at, len(self.found)).finished) > enough
