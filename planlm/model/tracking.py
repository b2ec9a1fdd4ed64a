"""Which sentence each position of a growing token sequence belongs to, for generation and for plain calls of the model.

A prompt's sentences are found as preparation finds them. A generated sentence ends where a sentence boundary would
stand if a capitalised word followed; that decision is taken once per token and never revised, so the plans behind a
KV cache stay those that were used. States are functions of the token prefix alone: beams and sampled continuations
may be reordered at will, and cached and uncached generation see the same plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planlm.text.alignment import tokenize
from planlm.text.encoder import SentenceEncoder
from planlm.text.sentences import ends_sentence, split_sentences


@dataclass(frozen=True)
class TrackedText:
    """Sentences in a token prefix.

    Attributes:
        segments: for each position, number of the sentence that holds (or will hold) the token after it.
        sentences: text of the finished sentences.
        embeddings: their embeddings, `[A]` each.
        open_start: position of the first token of the unfinished sentence.
    """

    segments: tuple[int, ...] = ()
    sentences: tuple[str, ...] = ()
    embeddings: tuple[np.ndarray, ...] = ()
    open_start: int = 0


class SentenceTracker:
    """Follows token sequences and turns them into the model's plan inputs.

    Args:
        tokenizer: the LM's tokenizer.
        encoder: sentence encoder.
        forced_actions: actions for the sentence that the prompt leaves open and those after it.
    """

    def __init__(self, tokenizer: Any, encoder: SentenceEncoder, forced_actions: list[int] | None = None) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder
        self.forced_actions = forced_actions or []
        self._states: dict[tuple[int, ...], TrackedText] = {}
        self._first_forced: int | None = None

    def track(self, ids: tuple[int, ...]) -> TrackedText:
        """Sentences of the token prefix `ids`; quick where `ids[:-1]` has been tracked before."""
        if ids not in self._states:
            before = self._states.get(ids[:-1])
            self._states[ids] = self._extend(before, ids) if before is not None else self._track_prompt(ids)
        return self._states[ids]

    def inputs(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, length: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Plan inputs of the last `length` positions (default: all) of `input_ids` `[B, W]`.

        Returns:
            `segment_ids` `[B, length]`, -1 on padding; `segment_rows` `[S, 2]`; `sentence_embeddings` `[B, n, A]`
            float32, a document a row as `Planner` has them; forced actions `[S]` (-1: the planner's choice), or None
            where none are forced.
        """
        num_rows, width = input_ids.shape
        length = width if length is None else length
        real = (
            torch.ones_like(input_ids, dtype=torch.bool)
            if attention_mask is None
            else attention_mask[:, -width:].bool()
        )
        states = [self.track(tuple(ids[keep].tolist())) for ids, keep in zip(input_ids, real, strict=True)]
        segments = torch.full((num_rows, width), -1, dtype=torch.long)
        for row, state in enumerate(states):
            segments[row, real[row].cpu()] = torch.tensor(state.segments, dtype=torch.long)
        segments = segments[:, width - length :]
        rows: list[tuple[int, int]] = []
        for row in range(num_rows):
            used = segments[row][segments[row] >= 0]
            if len(used):
                first, last = int(used[0]), int(used[-1])
                segments[row][segments[row] >= 0] += len(rows) - first
                rows += [(row, sentence) for sentence in range(first, last + 1)]
        longest = max(len(state.embeddings) for state in states)
        embeddings = torch.zeros(num_rows, longest + 1, self.encoder.dim)
        for row, state in enumerate(states):
            if state.embeddings:
                embeddings[row, 1 : len(state.embeddings) + 1] = torch.from_numpy(np.stack(state.embeddings))
        device = input_ids.device
        segment_rows = torch.tensor(rows, dtype=torch.long, device=device).reshape(-1, 2)
        return segments.to(device), segment_rows, embeddings.to(device), self._forced(states, rows, device)

    def _forced(self, states: list[TrackedText], rows: list[tuple[int, int]], device: torch.device) -> Tensor | None:
        if not self.forced_actions:
            return None
        if self._first_forced is None:  # the prompt: the sentence that its last position predicts
            self._first_forced = states[0].segments[-1]
        offsets = [sentence - self._first_forced for _, sentence in rows]
        forced = [self.forced_actions[at] if 0 <= at < len(self.forced_actions) else -1 for at in offsets]
        return torch.tensor(forced, dtype=torch.long, device=device)

    def _track_prompt(self, ids: tuple[int, ...]) -> TrackedText:
        text = self.decode(ids)
        spans = split_sentences(text)
        canonical, counts = tokenize(self.tokenizer, text, spans)
        if not spans or tuple(canonical) != ids:  # not how the tokenizer cuts this text: go token by token
            state = TrackedText()
            for end in range(1, len(ids) + 1):
                state = self._extend(state, ids[:end])
            return state
        finished = len(spans) if ends_sentence(text) else len(spans) - 1
        owner = np.repeat(np.arange(len(spans)), counts)  # sentence of each token
        sentences = tuple(text[begin:end] for begin, end in spans[:finished])
        return TrackedText(
            segments=(*owner[1:].tolist(), finished),
            sentences=sentences,
            embeddings=tuple(self.encoder.encode(list(sentences))) if sentences else (),
            open_start=len(ids) if finished == len(spans) else int(np.sum(counts[:finished])),
        )

    def _extend(self, before: TrackedText, ids: tuple[int, ...]) -> TrackedText:
        """One token more than `before`."""
        open_text = self.decode(ids[before.open_start :])
        if open_text.strip() and not open_text.endswith("\ufffd") and ends_sentence(open_text):
            sentence = open_text.strip()
            return TrackedText(
                segments=(*before.segments, len(before.sentences) + 1),
                sentences=(*before.sentences, sentence),
                embeddings=(*before.embeddings, self.encoder.encode([sentence])[0]),
                open_start=len(ids),
            )
        return TrackedText(
            (*before.segments, len(before.sentences)), before.sentences, before.embeddings, before.open_start
        )

    def decode(self, ids: tuple[int, ...]) -> str:
        """Text of `ids` without special tokens, as the tokenizer's own joining leaves it."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
