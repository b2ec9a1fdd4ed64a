"""Which sentence each position of a growing token sequence belongs to, for generation and for plain calls of the model.

A prompt's sentences are found as preparation finds them. What comes after it is cut token by token: a sentence ends
where a sentence boundary would stand if a capitalised word followed. That decision is taken once and never revised, so
the plans behind a KV cache stay those that were used. What is found depends on prompt and continuation alone: beams,
samples and candidates of assisted decoding may be reordered and dropped at will, and cached and uncached generation
see the same plans.

Sizes: B texts (rows), W positions, S plan segments, n sentences, A dimensions of a sentence embedding.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from planlm.text.alignment import tokenize
from planlm.text.encoder import SentenceEncoder
from planlm.text.sentences import ends_sentence, split_sentences


class TextInputs(NamedTuple):
    """The model's plan inputs of some texts.

    Attributes:
        segment_ids: int64 `[B, W]`, -1 where there is no text.
        segment_rows: int64 `[S, 2]`, see `PlanLMForCausalLM.plan`.
        sentence_embeddings: float32 `[texts, n, A]`, a text a row, as `Planner` has them.
        forced: int64 `[S]` actions to follow, -1 for the planner's choice; None where none are forced.
    """

    segment_ids: Tensor
    segment_rows: Tensor
    sentence_embeddings: Tensor
    forced: Tensor | None = None


class TrackedText(NamedTuple):
    """Sentences in a token prefix.

    Attributes:
        segments: for each position, number of the sentence that holds (or will hold) the token after it.
        sentences: text of the finished sentences.
        embeddings: their embeddings, `[A]` each.
        open_start: position of the first token of the unfinished sentence.
    """

    segments: list[int]
    sentences: list[str]
    embeddings: list[np.ndarray]
    open_start: int


class SentenceTracker:
    """Follows token sequences and turns them into the model's plan inputs; memory is linear in the tokens seen.

    Args:
        tokenizer: the LM's tokenizer.
        encoder: sentence encoder.
        forced_actions: actions for the sentence that each prompt leaves open and those after it.
    """

    def __init__(self, tokenizer: Any, encoder: SentenceEncoder, forced_actions: list[int] | None = None) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder
        self.forced_actions = forced_actions or []
        self._prompts: list[_Prompt] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> SentenceTracker:
        """A copy with the same tokenizer and encoder: a cache is copied for a branch of its text, not they."""
        clone = copy.copy(self)
        memo[id(self)] = clone
        clone._prompts = copy.deepcopy(self._prompts, memo)
        return clone

    def start(self, input_ids: Tensor, real: Tensor | None = None, positions: Tensor | None = None) -> None:
        """Take these texts, given as in `inputs`, for prompts; what was followed before is forgotten."""
        self._prompts = [_Prompt(self, ids) for _, _, ids in _texts(input_ids, real, positions)]

    def track(self, ids: tuple[int, ...]) -> TrackedText:
        """Sentences of the token prefix `ids`, which continues a prompt that was seen or else is one."""
        tokens = list(ids)
        return self._prompt(tokens, 0, 1).text(tokens)

    def inputs(
        self, input_ids: Tensor, real: Tensor | None = None, length: int | None = None, positions: Tensor | None = None
    ) -> TextInputs:
        """Plan inputs of the last `length` positions (default: all) of texts from their beginning on.

        Args:
            input_ids: `[B, W]`.
            real: `[B, W]`, False where there is no text, as on padding; default True everywhere.
            length: positions to give segments for.
            positions: `[B, W]`, where one row holds several texts behind each other: one begins where these do not go
                on by one.
        """
        if not self._prompts:
            self.start(input_ids, real, positions)
        width = input_ids.shape[1]
        first_column = 0 if length is None else width - length
        segments = torch.full(input_ids.shape, -1, dtype=torch.long)
        rows: list[tuple[int, int]] = []
        embeddings, forced = [], []
        texts = _texts(input_ids, real, positions)
        for number, (row, columns, tokens) in enumerate(texts):
            prompt = self._prompt(tokens, number, len(texts))
            text = prompt.text(tokens)
            embeddings.append(text.embeddings)
            shown = torch.tensor(text.segments, dtype=torch.long)[columns >= first_column]
            if not len(shown):
                continue
            first, last = int(shown[0]), int(shown[-1])
            segments[row, columns[columns >= first_column]] = shown - first + len(rows)
            rows += [(number, sentence) for sentence in range(first, last + 1)]
            forced += [self._forced(sentence - prompt.open_sentence) for sentence in range(first, last + 1)]
        device = input_ids.device
        return TextInputs(
            segments[:, first_column:].to(device),
            torch.tensor(rows, dtype=torch.long, device=device).reshape(-1, 2),
            _padded(embeddings, self.encoder.dim).to(device),
            torch.tensor(forced, dtype=torch.long, device=device) if self.forced_actions else None,
        )

    def _forced(self, number: int) -> int:
        """Action forced on the sentence `number` places behind the one that its prompt leaves open, or -1."""
        return self.forced_actions[number] if 0 <= number < len(self.forced_actions) else -1

    def _prompt(self, tokens: list[int], number: int, count: int) -> _Prompt:
        """The prompt of the text `number` of `count`; rows of one prompt, as beams are, stand side by side."""
        at = number * len(self._prompts) // count
        found = next((prompt for prompt in (*self._prompts[at:], *self._prompts[:at]) if prompt.leads_to(tokens)), None)
        if found is None:
            found = _Prompt(self, tokens)
            self._prompts.append(found)
        return found

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens, as the tokenizer's own joining leaves it."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class _Prompt:
    """A prompt and all its continuations, as a tree of tokens: node 0 is the prompt, each other one a token more.

    In flat lists, since chains of thousands of objects can be neither copied nor pickled.
    """

    def __init__(self, tracker: SentenceTracker, tokens: list[int]) -> None:
        self._tracker, self._tokens = tracker, tokens
        self._before, self._sentences, self._embeddings = [-1], [""], [np.empty(0)]  # sentence 0: there is none yet
        self._segments, sentences, open_start = _cut(tracker, tokens)
        if sentences:
            for sentence, embedding in zip(sentences, tracker.encoder.encode(sentences), strict=True):
                self._finish(len(self._before) - 1, sentence, embedding)
        self._children: dict[tuple[int, int], int] = {}
        self._last = [len(self._before) - 1]  # of each node: number of the last finished sentence in the lists above,
        self._count, self._open = [len(sentences)], [open_start]  # sentences finished, first token of the open one
        self.open_sentence = self._count[self._follow(tokens)]

    def leads_to(self, tokens: list[int]) -> bool:
        """Whether `tokens` continue this prompt or are a part of it."""
        length = min(len(tokens), len(self._tokens))
        return self._tokens[:length] == tokens[:length] and (length > 0 or not self._tokens)

    def text(self, tokens: list[int]) -> TrackedText:
        """Sentences of `tokens`, which `leads_to` took."""
        followed: list[int] = []
        node = self._follow(tokens, followed)
        chain, sentence = [], self._last[node]
        while sentence > 0:
            chain.append(sentence)
            sentence = self._before[sentence]
        chain.reverse()
        return TrackedText(
            (self._segments + followed)[: len(tokens)],
            [self._sentences[sentence] for sentence in chain],
            [self._embeddings[sentence] for sentence in chain],
            self._open[node],
        )

    def _follow(self, tokens: list[int], segments: list[int] | None = None) -> int:
        """The node that `tokens` end at, made if it is not there; appends the segment of each token on the way."""
        node = 0
        for end in range(len(self._segments) + 1, len(tokens) + 1):
            key = (node, tokens[end - 1])
            if key not in self._children:
                self._children[key] = self._extend(node, tokens[:end])
            node = self._children[key]
            if segments is not None:
                segments.append(self._count[node])
        return node

    def _extend(self, node: int, tokens: list[int]) -> int:
        """A node for one token more; the decision whether that ends the open sentence."""
        last, count, begin = self._last[node], self._count[node], self._open[node]
        open_text = self._tracker.decode(tokens[begin:])
        if open_text.strip() and not open_text.endswith("\ufffd") and ends_sentence(open_text):
            sentence = open_text.strip()
            last = self._finish(last, sentence, self._tracker.encoder.encode([sentence])[0])
            count, begin = count + 1, len(tokens)
        for values, value in ((self._last, last), (self._count, count), (self._open, begin)):
            values.append(value)
        return len(self._last) - 1

    def _finish(self, before: int, sentence: str, embedding: np.ndarray) -> int:
        self._before.append(before)
        self._sentences.append(sentence)
        self._embeddings.append(embedding)
        return len(self._before) - 1


def _cut(tracker: SentenceTracker, tokens: list[int]) -> tuple[list[int], list[str], int]:
    """Cut a prompt as preparation does: segments of its first tokens, finished sentences, start of the open one.

    Segments are given for as many tokens as could be cut at once; the others are to be followed one by one. Those are
    what may be padding, which must not change what stands before it: special tokens and a token repeated at the end
    (lm-evaluation-harness pads with zeros and gives no mask). None can be cut where this is not how the tokenizer
    cuts the text.
    """
    special = {*tracker.tokenizer.all_special_ids, 0}
    end = len(tokens)
    while end and (tokens[end - 1] in special or tokens[end - 2 : end - 1] == tokens[end - 1 : end]):
        last = tokens[end - 1]
        while end and tokens[end - 1] == last:
            end -= 1
    begin = next((at for at in range(end) if tokens[at] not in special), end)
    text = tracker.decode(tokens[begin:end])
    spans = split_sentences(text)
    if not spans:
        return [], [], 0
    canonical, counts = tokenize(tracker.tokenizer, text, spans)
    framed = len(canonical) - (end - begin)  # start tokens, which need not be there
    if framed < 0 or canonical[framed:].tolist() != tokens[begin:end]:
        return [], [], 0
    counts[0] += begin - framed
    finished = len(spans) if ends_sentence(text) else len(spans) - 1
    owner = np.repeat(np.arange(len(spans)), counts)  # sentence of each token
    open_start = end if finished == len(spans) else int(np.sum(counts[:finished]))
    return [*owner[1:].tolist(), finished], [text[begin:end] for begin, end in spans[:finished]], open_start


def _texts(input_ids: Tensor, real: Tensor | None, positions: Tensor | None) -> list[tuple[int, Tensor, list[int]]]:
    """Row, columns and tokens of each text; a row has one at least, though it may be empty."""
    ids, found = input_ids.cpu(), []
    keep = torch.ones(ids.shape, dtype=torch.bool) if real is None else real.cpu()
    for row in range(len(ids)):
        columns = keep[row].nonzero()[:, 0]
        starts = [] if positions is None else ((positions[row].cpu()[columns].diff() != 1).nonzero()[:, 0] + 1).tolist()
        found += [(row, part, ids[row, part].tolist()) for part in columns.tensor_split(starts)]
    return found


def _padded(embeddings: list[list[np.ndarray]], dim: int) -> Tensor:
    """`[texts, n, A]`: at each place the embedding of the sentence before, 0 where there is none."""
    longest = max(map(len, embeddings), default=0)
    padded = torch.zeros(len(embeddings), longest + 1, dim)
    for row, own in enumerate(embeddings):
        if own:
            padded[row, 1 : len(own) + 1] = torch.from_numpy(np.stack(own))
    return padded
