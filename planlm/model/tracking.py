"""Which sentence each position of a growing token sequence belongs to, for generation and for plain calls of the model.

A prompt's sentences are found as preparation finds them. What comes after it is cut token by token: a sentence ends
where a sentence boundary would stand if a capitalised word followed. That decision is taken once and never revised, so
the plans behind a KV cache stay those that were used. What is found depends on prompt and continuation alone: beams,
samples and candidates of assisted decoding may be reordered and dropped at will, and cached and uncached generation
see the same plans.

Sizes: B sequences of W positions, S plan segments, n sentences, A dimensions of a sentence embedding, K actions.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from planlm.model.states import segment_means
from planlm.plan_inputs import PlanInputs
from planlm.text.alignment import tokenize
from planlm.text.encoder import SentenceEncoder
from planlm.text.sentences import ends_sentence, may_end_sentence, split_sentences

ActionNoise = Callable[[int, int], Tensor]
"""From the number of a prompt, and of a sentence behind its open one, to noise `[K]` as `PlanInputs` has it."""

ReadStates = Callable[[list[list[int]]], list[Tensor]]
"""From the tokens of texts to the LM's states that the planner reads, `[T, d]` of each."""

_LAST = 16
"""Tokens at the end of a text in which nearly every mark that ends a sentence is seen whole."""


@dataclass(slots=True)
class Sentence:
    """A finished sentence in the tree of a prompt's continuations.

    Attributes:
        before: index of the one before it.
        text: its text.
        embedding: float32 `[A]`.
        logits: `[K]`, the planner's for the sentence after it, as they were used; None where it was not asked.
        state: `[d]`, mean of the LM's states of its tokens; None where the planner does not read them.
    """

    before: int
    text: str
    embedding: np.ndarray
    logits: Tensor | None = None
    state: Tensor | None = None


class TrackedText(NamedTuple):
    """Sentences in a token prefix.

    Attributes:
        segments: for each position, number of the sentence that holds (or will hold) the token after it.
        finished: the finished sentences, behind an empty one (with an embedding of zeros) that stands before the first.
        open_start: position of the first token of the unfinished sentence.
    """

    segments: list[int]
    finished: list[Sentence]
    open_start: int

    @property
    def sentences(self) -> list[str]:
        """Text of the finished sentences."""
        return [sentence.text for sentence in self.finished[1:]]


class SentenceTracker:
    """Follows token sequences, turns them into the model's plan inputs and keeps the plans that were used.

    Memory is linear in the tokens seen.

    Args:
        tokenizer: the LM's tokenizer.
        encoder: sentence encoder.
        forced_actions: actions for the sentence that each prompt leaves open and those after it, -1 for the planner's;
            or a list of these for each prompt in turn.
        action_bias: `[K]`, see `PlanInputs`.
        action_noise: where it is given, the actions that are not forced are drawn by it.
    """

    def __init__(
        self,
        tokenizer: Any,
        encoder: SentenceEncoder,
        forced_actions: Sequence[int] | Sequence[Sequence[int]] | None = None,
        action_bias: Tensor | None = None,
        action_noise: ActionNoise | None = None,
    ) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder
        self.forced_actions = _by_prompt(forced_actions or [])
        self.action_bias, self.action_noise = action_bias, action_noise
        self._prompts: list[_Prompt] = []
        self._asked: list[Sentence] = []  # for each segment of the inputs given last, the sentence before it
        self._read: list[Sentence] = []  # those whose states the inputs given last brought
        self._given: tuple[Tensor, bool, list[Sentence], PlanInputs] | None = None  # the last inputs, and what for

    def __deepcopy__(self, memo: dict[int, Any]) -> SentenceTracker:
        """A copy with the same tokenizer and encoder: a cache is copied for a branch of its text, not they."""
        clone = copy.copy(self)
        memo[id(self)] = clone
        clone._prompts, clone._asked = copy.deepcopy((self._prompts, self._asked), memo)
        return clone

    def start(self, input_ids: Tensor, real: Tensor | None = None, positions: Tensor | None = None) -> None:
        """Take these texts, given as in `inputs`, for prompts; what was followed before is forgotten."""
        self._prompts = []
        for _, _, ids in _texts(input_ids, real, positions):
            self._prompts.append(_Prompt(self, ids, len(self._prompts)))

    def track(self, ids: list[int], number: int = 0, count: int = 1) -> TrackedText:
        """Sentences of the token prefix `ids`, which continues a prompt that was seen or else is one.

        Args:
            ids: the text's tokens.
            number: of the text among those of a batch.
            count: so many it has.
        """
        return self._prompt(ids, number, count).follow(ids)

    def inputs(
        self,
        input_ids: Tensor,
        real: Tensor | None = None,
        length: int | None = None,
        positions: Tensor | None = None,
        read: ReadStates | None = None,
    ) -> PlanInputs:
        """Plan inputs of the last `length` positions (default: all) of texts from their beginning on.

        Args:
            input_ids: `[B, W]`.
            real: `[B, W]`, False where there is no text, as on padding; default True everywhere.
            length: positions to give segments for.
            positions: `[B, W]`, where a sequence holds several texts behind each other: one begins where these do not
                go on by one.
            read: makes the LM's states for a planner that reads them; asked once for each finished sentence.

        Returns:
            Each text as one sequence of the planner; actions that are forced as oracles of weight 1. Without gradients
            the very object that was given last, as long as no sentence has ended: then nothing has to be planned anew.
        """
        if not self._prompts:
            self.start(input_ids, real, positions)
        width = input_ids.shape[1]
        first_column = 0 if length is None else width - length
        segments = torch.full(input_ids.shape, -1, dtype=torch.long)
        segment_rows: list[tuple[int, int]] = []
        places: list[tuple[int, int]] = []  # of each segment, the prompt, and the sentence behind its open one
        self._asked = []
        followed: list[tuple[list[int], TrackedText]] = []
        texts = _texts(input_ids, real, positions)
        for number, (row, columns, tokens) in enumerate(texts):
            prompt = self._prompt(tokens, number, len(texts))
            text = prompt.follow(tokens)
            followed.append((tokens, text))
            shown = torch.tensor(text.segments, dtype=torch.long)[columns >= first_column]
            if not len(shown):
                continue
            first, last = int(shown[0]), int(shown[-1])
            segments[row, columns[columns >= first_column]] = shown - first + len(segment_rows)
            segment_rows += [(number, sentence) for sentence in range(first, last + 1)]
            places += [(prompt.number, sentence - prompt.open_sentence) for sentence in range(first, last + 1)]
            self._asked += text.finished[first : last + 1]
        device, segments = input_ids.device, segments[:, first_column:]
        if (given := self._as_before(segments, read is not None, device)) is not None:
            self._read = []
            return given
        embeddings = [
            torch.from_numpy(np.stack([sentence.embedding for sentence in text.finished])).float()
            for _, text in followed
        ]
        found = PlanInputs(
            segment_ids=segments.to(device),
            segment_rows=torch.tensor(segment_rows, dtype=torch.long, device=device).reshape(-1, 2),
            sentence_embeddings=nn.utils.rnn.pad_sequence(embeddings, batch_first=True).to(device),
            sentence_states=None if read is None else self._states(followed, read),
            action_bias=None if self.action_bias is None else self.action_bias.to(device),
            **self._decided(places, device),
        )
        self._given = None if torch.is_grad_enabled() else (segments, read is not None, self._asked, found)
        return found

    def _decided(self, places: list[tuple[int, int]], device: torch.device) -> dict[str, Any]:
        """Fields of `PlanInputs` for the actions that are forced or drawn, as oracles of weight 1."""
        if self.action_noise is None and not any(self.forced_actions):
            return {}
        forced = [self.forced(number, prompt) for prompt, number in places]
        draws = [self.action_noise is not None and number >= 0 for _, number in places]
        weight = [float(action >= 0 or drawn) for action, drawn in zip(forced, draws, strict=True)]
        decided = {
            "actions": torch.tensor(forced, dtype=torch.long, device=device),
            "oracle_weight": torch.tensor(weight, device=device),
        }
        if self.action_noise is not None:
            noise = [self.action_noise(prompt, max(number, 0)) for prompt, number in places]
            decided["action_noise"] = torch.stack(noise).to(device)
        return decided

    def _as_before(self, segments: Tensor, reads: bool, device: torch.device) -> PlanInputs | None:
        """The inputs given last, if they serve: for positions of the same sentences."""
        if self._given is None or torch.is_grad_enabled():
            return None
        before, did_read, asked, inputs = self._given
        is_same = len(asked) == len(self._asked) and all(map(operator.is_, asked, self._asked))
        is_same = is_same and did_read is reads and inputs.segment_ids.device == device
        return inputs if is_same and torch.equal(before, segments) else None

    def _states(self, texts: list[tuple[list[int], TrackedText]], read: ReadStates) -> Tensor | None:
        """The LM's mean states `[B, n, d]` of texts' finished sentences, behind a zero that stands before the first.

        None where no sentence is finished.
        """
        new: dict[int, tuple[Sentence, int, int]] = {}  # by identity, for texts may share sentences
        asked: list[tuple[list[int], TrackedText]] = []
        for tokens, text in texts:
            missing = [
                (at, one) for at, one in enumerate(text.finished[1:]) if one.state is None and id(one) not in new
            ]
            if missing:
                new |= {id(one): (one, len(asked), at) for at, one in missing}
                asked.append((tokens[: text.open_start], text))
        means = []
        found = read([tokens for tokens, _ in asked]) if asked else []
        for (tokens, text), states in zip(asked, found, strict=True):
            # Position t carries the sentence of token t + 1.
            owners = [0 if text.segments[0] == 0 else -1, *text.segments[: len(tokens) - 1]]
            means.append(segment_means(states, torch.tensor(owners, device=states.device), len(text.finished) - 1))
        for one, number, at in new.values():
            one.state = means[number][at]
        self._read = [one for one, _, _ in new.values()]
        known = [[one.state for one in text.finished[1:] if one.state is not None] for _, text in texts]
        zero = next((torch.zeros_like(states[0]) for states in known if states), None)
        if zero is None:
            return None
        return nn.utils.rnn.pad_sequence([torch.stack([zero, *states]) for states in known], batch_first=True)

    def begins(self, input_ids: Tensor, real: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """bool `[B, W]`, the first position of each segment of texts from their beginning on; see `inputs`."""
        if not self._prompts:
            self.start(input_ids, real, positions)
        found = torch.zeros(input_ids.shape, dtype=torch.bool)
        texts = _texts(input_ids, real, positions)
        for number, (row, columns, tokens) in enumerate(texts):
            segments = self._prompt(tokens, number, len(texts)).follow(tokens).segments
            found[row, columns] = torch.tensor([-1, *segments]).diff() != 0
        return found.to(input_ids.device)

    def record(self, logits: Tensor) -> None:
        """Keep the planner's logits `[S, K]` for the segments of the inputs given last: they are used now."""
        for before, used in zip(self._asked, logits.detach(), strict=False):
            before.logits = used
        for one in self._read:  # a later call has nothing to do with this one's gradients
            one.state = None if one.state is None else one.state.detach()
        self._read = []

    def forced(self, number: int, prompt: int = 0) -> int:
        """Action forced on the `number`-th sentence behind the one that the prompt leaves open, or -1."""
        actions = self.forced_actions[prompt % len(self.forced_actions)]
        return actions[number] if 0 <= number < len(actions) else -1

    def asks(self, number: int, prompt: int = 0) -> bool:
        """Whether an action is forced on that sentence or drawn for it."""
        return self.action_noise is not None or self.forced(number, prompt) >= 0

    def asks_from(self, number: int, prompt: int = 0) -> bool:
        """Whether it is so for that sentence or one behind it."""
        actions = self.forced_actions[prompt % len(self.forced_actions)]
        return self.action_noise is not None or max(actions[number:], default=-1) >= 0

    def drawn(self, number: int, prompt: int, logits: Tensor | None) -> int:
        """Action drawn for that sentence, of which the planner said `logits` `[K]`, or -1."""
        if self.action_noise is None or logits is None or self.forced(number, prompt) >= 0:
            return -1
        return int((logits + self.action_noise(prompt, number).to(logits.device)).argmax())

    def _prompt(self, tokens: list[int], number: int, count: int) -> _Prompt:
        """The prompt of the text `number` of `count`; texts of one prompt, as beams are, stand side by side."""
        at = number * len(self._prompts) // count
        found = next((prompt for prompt in (*self._prompts[at:], *self._prompts[:at]) if prompt.leads_to(tokens)), None)
        if found is None:
            found = _Prompt(self, tokens, len(self._prompts))
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

    def __init__(self, tracker: SentenceTracker, tokens: list[int], number: int) -> None:
        self._tracker, self._tokens, self.number = tracker, tokens, number
        self._sentences = [Sentence(-1, "", np.zeros(tracker.encoder.dim, np.float32))]  # stands before the first one
        self._segments, sentences, open_start = _cut(tracker, tokens)
        for sentence, embedding in zip(sentences, tracker.encoder.encode(sentences), strict=True):
            self._sentences.append(Sentence(len(self._sentences) - 1, sentence, embedding))
        self._children: dict[tuple[int, int], int] = {}
        # Of each node: index of the last finished sentence, how many there are, and where the open one begins.
        self._nodes = [(len(sentences), len(sentences), open_start)]
        self.open_sentence = len(self.follow(tokens).finished) - 1

    def leads_to(self, tokens: list[int]) -> bool:
        """Whether `tokens` continue this prompt or are a part of it."""
        length = min(len(tokens), len(self._tokens))
        return self._tokens[:length] == tokens[:length] and (length > 0 or not self._tokens)

    def follow(self, tokens: list[int]) -> TrackedText:
        """Sentences of `tokens`, which `leads_to` took."""
        node, segments = 0, self._segments[: len(tokens)]
        for end in range(len(self._segments), len(tokens)):
            key = (node, tokens[end])
            if key not in self._children:
                self._nodes.append(self._extended(node, tokens, end + 1))
                self._children[key] = len(self._nodes) - 1
            node = self._children[key]
            segments.append(self._nodes[node][1])
        last, _, open_start = self._nodes[node]
        finished = []
        while last >= 0:
            finished.append(self._sentences[last])
            last = self._sentences[last].before
        return TrackedText(segments, finished[::-1], open_start)

    def _extended(self, node: int, tokens: list[int], end: int) -> tuple[int, int, int]:
        """The node of `tokens[:end]`, one token behind `node`: the decision whether that ends the open sentence."""
        last, count, begin = self._nodes[node]
        decode = self._tracker.decode
        # Most tokens end no sentence, and the last ones tell, so that a long sentence is not read at every token.
        if end - begin > _LAST and not may_end_sentence(decode(tokens[end - _LAST : end])):
            return last, count, begin
        text = decode(tokens[begin:end])
        if not text.strip() or text.endswith("\ufffd") or not ends_sentence(text):
            return last, count, begin
        self._sentences.append(Sentence(last, text.strip(), self._tracker.encoder.encode([text.strip()])[0]))
        return len(self._sentences) - 1, count + 1, end


def centroid_distances(embedding: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared distances `[K]` of a sentence to the centroids of actions: it carries the action of the nearest.

    Args:
        embedding: the sentence's, `[A]`; rounded as in preparation.
        centroids: float32 `[K, A]`.
    """
    distances: np.ndarray = np.square(embedding.astype(np.float16).astype(np.float32) - centroids).sum(axis=1)
    return distances


def _by_prompt(actions: Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
    """Forced actions as a list for each prompt in turn, one list for all where they are not."""
    if all(isinstance(one, int) for one in actions):
        return [list(cast(Sequence[int], actions))]
    return [list(one) for one in cast(Sequence[Sequence[int]], actions)]


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
    """Sequence, columns and tokens of each text; a sequence has one at least, though it may be empty."""
    ids, found = input_ids.cpu(), []
    keep = torch.ones(ids.shape, dtype=torch.bool) if real is None else real.cpu()
    for row in range(len(ids)):
        columns = keep[row].nonzero()[:, 0]
        starts = [] if positions is None else ((positions[row].cpu()[columns].diff() != 1).nonzero()[:, 0] + 1).tolist()
        found += [(row, part, ids[row, part].tolist()) for part in columns.tensor_split(starts)]
    return found
