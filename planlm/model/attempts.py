"""Sentences that carry the action asked for: each is written several times, and the first that does is kept.

That is rejection sampling: a sentence kept because it carries its action is a draw from the model's distribution over
such sentences. Where none does, the one nearest to the action is kept. A sentence carries the action whose centroid is
nearest to its embedding, as in preparation.

Sizes: B texts, n attempts, K actions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import StoppingCriteria

from planlm.config import EvaluateGenerationConfig, GenerateConfig
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.sampling import SharedGumbel, left_padded, sampled
from planlm.model.tracking import SentenceTracker, TrackedText, centroid_distances


class GrowingTracker(SentenceTracker):
    """A tracker that one `generate()` after the other goes on with: only the first one's texts are its prompts."""

    def start(self, input_ids: Tensor, real: Tensor | None = None, positions: Tensor | None = None) -> None:
        """Take these texts for prompts, unless there are some."""
        if not self._prompts:
            super().start(input_ids, real, positions)


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
        New tokens of each text, up to its end token.
    """
    centroids, padding = model.centroids.numpy(), settings["pad_token_id"]
    texts = [list(prompt) for prompt in prompts]
    ids, mask = left_padded(texts, padding, torch.device("cpu"))
    tracker.start(ids, mask.bool())
    first = [len(tracker.track(text, at, len(texts)).sentences) for at, text in enumerate(texts)]
    room = [config.max_new_tokens] * len(texts)
    while any(room):
        before = [tracker.track(text, at, len(texts)) for at, text in enumerate(texts)]
        numbers = [len(text.sentences) - begin for text, begin in zip(before, first, strict=True)]
        is_asked = [bool(room[at]) and tracker.asks(number, at) for at, number in enumerate(numbers)]
        count = config.attempts if any(is_asked) else 1
        rows = [text for text in texts for _ in range(count)]
        # Rows without room end at their first token: those of texts that are over, and attempts at what none asks for.
        left = [room[at] * (is_asked[at] or not one) for at in range(len(texts)) for one in range(count)]
        ids, mask = left_padded(rows, padding, model.device)
        written = [len(text) - len(prompt) for text, prompt in zip(texts, prompts, strict=True)]
        noise = SharedGumbel(config.seed, keys, ids.shape[1], written=written, attempts=count)
        until = [len(text.finished) if tracker.asks_from(numbers[at], at) else None for at, text in enumerate(before)]
        ends = _Ends(model, tracker, rows, left, [one for one in until for _ in range(count)], padding)
        model.generate(
            ids,
            attention_mask=mask,
            tracker=tracker,
            max_new_tokens=max(left),
            logits_processor=sampled(model.generation_config, config.temperature, config.top_p, noise),
            stopping_criteria=[ends],
            do_sample=False,
            **settings,
        )
        for at, text in enumerate(texts):
            if room[at]:
                own = ends.found[at * count : (at + 1) * count]
                tried = [tracker.track(text + new, at, len(texts)) for new in own] if is_asked[at] else []
                new = own[_chosen(tracker, tried, len(before[at].finished), (numbers[at], at), centroids)]
                text += new
                room[at] = 0 if ends.is_end(new) else room[at] - len(new)
                step(len(new))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _chosen(
    tracker: SentenceTracker,
    tried: Sequence[TrackedText],
    sentence: int,
    which: tuple[int, int],
    centroids: NDArray[np.float32],
) -> int:
    """Number of the attempt to keep: the first that carries its action, else of those that are whole the nearest.

    Args:
        tracker: what knows the action.
        tried: the text with each attempt; none where nothing is asked.
        sentence: where it stands among the finished ones.
        which: number of the sentence behind the one that its prompt leaves open, and of the prompt.
        centroids: `[K, A]`.
    """
    if not tried:
        return 0
    action = tracker.forced(*which)
    action = tracker.drawn(*which, tried[0].finished[sentence - 1].logits) if action < 0 else action
    nearest = (np.inf, 0)
    for number, text in enumerate(tried):
        if action < 0 or len(text.finished) == sentence:
            continue
        distances = centroid_distances(text.finished[sentence].embedding, centroids)
        if distances.argmin() == action:
            return number
        nearest = min(nearest, (float(distances[action]), number))
    return nearest[1]


class _Ends(StoppingCriteria):  # type: ignore[misc]
    """Ends a row where its sentence does, at an end token, or where it has no more room.

    Attributes:
        found: new tokens of each row that has ended.
        eos_token_id: transformers fills up rows that have ended only where a criterion has this attribute.
    """

    eos_token_id = None

    def __init__(
        self,
        model: PlanLMForCausalLM,
        tracker: SentenceTracker,
        rows: Sequence[list[int]],
        room: Sequence[int],
        finished: Sequence[int | None],
        padding: int,
    ) -> None:
        """Take the rows' texts, the tokens that each has room for, and how many finished sentences are too few."""
        end = model.generation_config.eos_token_id
        self._ends = set(end) if isinstance(end, list) else {end}
        self._ends |= {padding} & set(model.tokenizer.all_special_ids)  # behind one of the settings' stop strings
        self._tracker, self._rows, self._room, self._finished = tracker, rows, room, finished
        self._width = max(map(len, rows))
        self._is_over = [False] * len(rows)
        self.found: list[list[int]] = [[] for _ in rows]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows have ended, bool `[B n]`."""
        for at, new in enumerate(input_ids[:, self._width :].tolist()):
            if not self._is_over[at]:
                self.found[at] = new
                self._is_over[at] = len(new) >= self._room[at] or self.is_end(new) or self._has_sentence(at)
        return torch.tensor(self._is_over, device=input_ids.device)

    def is_end(self, new: Sequence[int]) -> bool:
        """Whether a text ends with these tokens."""
        return new[-1] in self._ends

    def _has_sentence(self, at: int) -> bool:
        enough, text = self._finished[at], self._rows[at] + self.found[at]
        return enough is not None and len(self._tracker.track(text, at, len(self._rows)).finished) > enough
