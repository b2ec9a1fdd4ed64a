"""What the actions of a corpus mean: size, terms, typical sentences, where in a document they are and what follows.

Sizes: K actions, n sentences.
"""

from __future__ import annotations

import bisect
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from planlm.config import ActionsConfig
from planlm.corpus.labels import TERMS, label_of, label_run, read_labels, renamed, write_labels
from planlm.corpus.store import PreparedCorpus
from planlm.corpus.writing import joined
from planlm.errors import InputError
from planlm.files import beside_result, write_json
from planlm.progress import Progress

DESCRIBED = "actions.json"
"""File in a corpus with what was described last, for reports."""

EXAMPLES_OF_ONE = 5
"""Times as many sentences are shown where only one action is asked for."""

FIFTHS = 5
"""Parts of a document that an action's sentences are counted in."""

FOLLOWERS = 3
"""Next actions that are named, of each action."""

LABELLED_FROM = 2000
"""Training documents that `prepare` makes labels of."""

MAPPED_BY_TSNE = 24
"""Actions from which on a linear map would lay too many upon each other."""

MOST_WORDS = 5_000_000
"""Counts of a word in an action that are kept: some 500 MB."""

LONGEST = 20_000
"""Characters of a sentence that are looked at."""

TOGETHER = 4096
"""Sentences whose distances are computed at a time."""

_WORD = re.compile(r"[^\W\d_][^\W\d_]+(?:['’-][^\W\d_]+)*")


@dataclass(frozen=True)
class Borderline:
    """A sentence that is nearly as close to another action's centroid."""

    text: str
    other: int


@dataclass(frozen=True)
class Follower:
    """An action and how often it is the next one, as a share of the sentences that have a next one."""

    action: int
    share: float


@dataclass(frozen=True)
class ActionDescription:
    """One action, as the training split shows it.

    Attributes:
        action: its number.
        label: a few of its terms, or what somebody has named it.
        sentences: training sentences that have it.
        share: of all training sentences, from 0 to 1.
        terms: the words most distinctive for it, see `_distinctive`.
        examples: the sentences nearest to the centroid, nearest first, no text twice.
        borderline: sentences that are nearly as close to another centroid, the closest first.
        places: shares of its sentences in the first to the last fifth of their documents.
        followed_by: the most frequent next actions.
    """

    action: int
    label: str
    sentences: int
    share: float
    terms: list[str]
    examples: list[str]
    borderline: list[Borderline]
    places: list[float]
    followed_by: list[Follower]


def describe_actions(config: ActionsConfig) -> list[ActionDescription]:
    """Describe every action of a corpus, the most common first, or one with more examples; and name some.

    The labels are kept in the corpus: those that are there stay as they are, but for `config.name`. What is said of all
    actions is kept in `actions.json`, with each action's place on a map.

    Raises:
        InputError: no such corpus, action or run, or a label that cannot be one.
    """
    corpus = PreparedCorpus.load(config.corpus)
    num_actions = corpus.manifest.num_actions
    if config.action is not None and not 0 <= config.action < num_actions:
        raise InputError(f"--action {config.action}: {config.corpus} has the actions 0 to {num_actions - 1}")
    kept = read_labels(corpus.path, num_actions)
    renamed(kept or [""] * num_actions, config.name or ())  # what is wrong with them is said before all reading
    wanted = list(range(num_actions)) if config.action is None else [config.action]
    reading = _Reading(corpus, wanted, config.examples * (1 if config.action is None else EXAMPLES_OF_ONE))
    reading.read()
    terms = _distinctive(reading.words, max(config.terms, TERMS))
    labels = renamed(kept or [label_of(words) for words in terms], config.name or ())
    if labels != kept:
        write_labels(corpus.path, labels)
    if config.run is not None:
        label_run(Path(config.run), labels, corpus.fingerprint)
    described = [reading.describe(action, labels[action], terms[action][: config.terms]) for action in wanted]
    described.sort(key=lambda one: -one.sentences)
    if config.action is None:
        with beside_result(corpus.path / DESCRIBED):
            positions = on_a_map(corpus.codebook.numpy())
            content = {"actions": [asdict(one) | {"position": positions[one.action]} for one in described]}
            write_json(corpus.path / DESCRIBED, content, within=corpus.path)
    return described


def label_actions(corpus: PreparedCorpus, given: PreparedCorpus | None = None) -> None:
    """Give a corpus labels, unless it has some: those of the corpus that its actions were given by, or made of terms.

    Terms are of at most `LABELLED_FROM` training documents.
    """
    if read_labels(corpus.path, corpus.manifest.num_actions) is not None:
        return
    labels = None if given is None else read_labels(given.path, given.manifest.num_actions)
    if labels is not None:
        write_labels(corpus.path, labels)
    else:
        reading = _Reading(corpus, [], 0)
        reading.read(LABELLED_FROM)
        write_labels(corpus.path, [label_of(words) for words in _distinctive(reading.words, TERMS)])


def on_a_map(codebook: NDArray) -> list[list[float]]:
    """A place in two dimensions for each action, near to those of similar actions: t-SNE, or of a few their PCA.

    Args:
        codebook: float32 `[K, A]`.
    """
    count = len(codebook)
    centred = (codebook - codebook.mean(axis=0)).astype(np.float64)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    places = np.zeros((count, 2))
    places[:, : len(sizes[:2])] = left[:, :2] * sizes[:2]
    if count >= MAPPED_BY_TSNE and np.ptp(places[:, 0]) > 0:
        from sklearn.manifold import TSNE

        start = places / places[:, 0].std() * 1e-4
        places = TSNE(perplexity=min(30, (count - 1) // 3), init=start, random_state=0).fit_transform(centred)
    span = max(np.ptp(places), 1e-12)
    return ((places - places.min(axis=0)) / span).round(4).tolist()


@dataclass
class _Nearest:
    """The best few of what is offered, by the least rank, no text twice."""

    size: int
    found: list[tuple[float, str, int]] = field(default_factory=list)

    def offer(self, rank: float, text: str, other: int = -1) -> None:
        if len(self.found) == self.size and (not self.size or rank >= self.found[-1][0]):
            return
        if all(text != known for _, known, _ in self.found):
            bisect.insort(self.found, (rank, text, other))
            del self.found[self.size :]


class _Reading:
    """One pass over the training split."""

    def __init__(self, corpus: PreparedCorpus, wanted: list[int], num_examples: int) -> None:
        self._corpus, self._codebook = corpus, corpus.codebook.numpy()
        num_actions = corpus.manifest.num_actions
        self.words: list[Counter[str]] = [Counter() for _ in range(num_actions)]
        self._typical = {action: _Nearest(num_examples) for action in wanted}
        self._borderline = {action: _Nearest(num_examples if num_actions > 1 else 0) for action in wanted}
        self._places = np.zeros((num_actions, FIFTHS), dtype=np.int64)
        self._pairs: dict[int, Counter[int]] = {action: Counter() for action in wanted}

    def read(self, most: int | None = None) -> None:
        """Read the documents, or `most` of them, evenly spread."""
        documents = self._corpus.split("train")
        if most is not None and most < len(documents):
            documents = documents.select([number * len(documents) // most for number in range(most)])
        documents = documents.with_format("arrow", columns=["text", "sentence_spans", "embeddings", "actions"])
        with Progress("Reading sentences", len(documents), "documents") as progress:
            for table in documents.iter(100):
                for row in range(len(table)):
                    self._add(table.slice(row, 1))
                _forget_rare(self.words)
                progress.advance(len(table))

    def describe(self, action: int, label: str, terms: list[str]) -> ActionDescription:
        """What was found of an action."""
        counts, pairs = self._places.sum(axis=1), self._pairs[action]
        return ActionDescription(
            action=action,
            label=label,
            sentences=int(counts[action]),
            share=float(counts[action] / counts.sum()),
            terms=terms,
            examples=[text for _, text, _ in self._typical[action].found],
            borderline=[Borderline(text, other) for _, text, other in self._borderline[action].found],
            places=(self._places[action] / max(1, counts[action])).round(4).tolist(),
            followed_by=[Follower(then, count / pairs.total()) for then, count in pairs.most_common(FOLLOWERS)],
        )

    def _add(self, document: pa.Table) -> None:
        text = document["text"][0].as_py()
        actions, spans, embeddings = (joined(document[name]) for name in ("actions", "sentence_spans", "embeddings"))
        np.add.at(self._places, (actions, np.arange(len(actions)) * FIFTHS // max(1, len(actions))), 1)
        for action, then in zip(actions[:-1].tolist(), actions[1:].tolist(), strict=True):
            if action in self._pairs:
                self._pairs[action][then] += 1
        for start in range(0, len(actions), TOGETHER):
            block = slice(start, start + TOGETHER)
            self._add_sentences(text, actions[block], spans[block], embeddings[block].astype(np.float32))

    def _add_sentences(self, text: str, actions: NDArray, spans: NDArray, embeddings: NDArray) -> None:
        own, margins, others = self._distances(actions, embeddings)
        for number, (action, (begin, end)) in enumerate(zip(actions.tolist(), spans.tolist(), strict=True)):
            sentence = text[begin : min(end, begin + LONGEST)]
            self.words[action].update(word.lower() for word in _WORD.findall(sentence))
            if action in self._typical:
                self._typical[action].offer(float(own[number]), sentence)
                self._borderline[action].offer(float(margins[number]), sentence, int(others[number]))

    def _distances(self, actions: NDArray, embeddings: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        """Of each sentence: squared distance to its centroid, how much farther the next one is, and which that is."""
        own = np.square(embeddings - self._codebook[actions]).sum(axis=1)
        if not self._typical or len(self._codebook) == 1:
            return own, own, np.zeros_like(actions)
        squares = np.square(self._codebook).sum(axis=1)
        distances = np.square(embeddings).sum(axis=1)[:, None] - 2 * embeddings @ self._codebook.T + squares  # [n, K]
        distances[np.arange(len(actions)), actions] = np.inf
        others = distances.argmin(axis=1)
        return own, distances[np.arange(len(actions)), others] - own, others


def _forget_rare(words: list[Counter[str]]) -> None:
    """Keep memory in bounds: drop the rarest words, none of which is typical of an action, when there are too many."""
    least = 1
    while sum(map(len, words)) > MOST_WORDS:
        for counter in words:
            for word in [word for word, count in counter.items() if count <= least]:
                del counter[word]
        least *= 2


def _distinctive(words: list[Counter[str]], size: int) -> list[list[str]]:
    """Of each action the words that stand out most against all others.

    By the z-score of a word's log-odds in the action against those outside, with all words as the prior (Monroe et al.,
    "Fightin' Words", 2008, eq. 16 and 22). c-TF-IDF weighs a word by how often it is in all, not by where: the first
    terms of a few large actions are then "the" and "of".
    """
    totals: Counter[str] = Counter()
    for counter in words:
        totals.update(counter)
    everything = totals.total()
    terms = []
    for counter in words:
        inside = counter.total()
        score = {
            word: _standing_out(count, inside, totals[word], everything)
            for word, count in counter.items()
            if count * everything > totals[word] * inside  # oftener than elsewhere
        }
        terms.append(sorted(score, key=lambda word: (-score[word], word))[:size])
    return terms


def _standing_out(count: int, inside: int, total: int, everything: int) -> float:
    """z-score of a word that is `count` of the `inside` words of an action, and `total` of `everything`."""
    here, elsewhere = count + total, 2 * total - count  # counts with their prior
    words_here, words_elsewhere = inside + everything, 2 * everything - inside
    odds = math.log(here / (words_here - here + 1)) - math.log(elsewhere / (words_elsewhere - elsewhere + 1))
    return odds / math.sqrt(1 / here + 1 / elsewhere)
