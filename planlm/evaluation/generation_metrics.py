"""What continuations are measured by: against the true ones, as sequences of actions, and by themselves.

Sizes: n texts, K actions, A dimensions of an embedding.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from planlm.corpus.codebook import assign_actions
from planlm.corpus.writing import joined
from planlm.errors import InputError
from planlm.text.sentences import ends_sentence, split_sentences

if TYPE_CHECKING:
    from planlm.text.encoder import SentenceEncoder

_PACKAGES = ("mauve", "rapidfuzz", "rouge_score")


def check_packages() -> None:
    """Refuse to begin without the packages that measure.

    Raises:
        InputError: names those that are not installed.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f"evaluate-generation needs {', '.join(missing)}: pip install 'planlm[metrics]'")


def finished_sentences(text: str) -> list[str]:
    """Sentences of a text as preparation cuts them, without a last one that was cut off where there are others."""
    sentences = [text[begin:end] for begin, end in split_sentences(text)]
    return sentences if len(sentences) < 2 or ends_sentence(text) else sentences[:-1]


def sentence_actions(sentences: list[str], encoder: SentenceEncoder, codebook: np.ndarray) -> np.ndarray:
    """The action of each sentence, int32 `[n]`, by the rounding of preparation; arguments as of `action_sequences`."""
    return assign_actions(encoder.encode(sentences).astype(np.float16), codebook)[0]


def action_sequences(texts: Sequence[str], encoder: SentenceEncoder, codebook: np.ndarray) -> list[list[int]]:
    """The actions of each text's sentences, as preparation finds them.

    Args:
        texts: n continuations.
        encoder: the corpus's.
        codebook: float32 [K, A].
    """
    sentences = [finished_sentences(text) for text in texts]
    together = [sentence for own in sentences for sentence in own]
    if not together:
        return [[] for _ in texts]
    actions = sentence_actions(together, encoder, codebook)
    return [part.tolist() for part in np.split(actions, np.cumsum([len(own) for own in sentences])[:-1])]


def rouge2(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-2 F-measure of each text, by rouge-score with its own tokens (lower-case a-z and digits), no stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge2"], use_stemmer=False)
    pairs = zip(texts, references, strict=True)
    return [float(scorer.score(reference, text)["rouge2"].fmeasure) for text, reference in pairs]


def edit_distances(
    sequences: Sequence[Sequence[int]], references: Sequence[Sequence[int]]
) -> tuple[list[float], list[float]]:
    """Levenshtein distance of each action sequence to its reference, and the same divided by the longer length."""
    from rapidfuzz.distance import Levenshtein

    pairs = list(zip(sequences, references, strict=True))
    distances = [float(Levenshtein.distance(one, other)) for one, other in pairs]
    return distances, [float(Levenshtein.normalized_distance(one, other)) for one, other in pairs]


def distinct(tokens: Sequence[int] | Sequence[str], n: int) -> float:
    """Share of distinct n-grams of tokens or words among all of a text (Li et al., 2016); 1 where it has none."""
    grams = list(zip(*(tokens[start:] for start in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(tokens: Sequence[int]) -> float:
    """Share of 4-grams that stand earlier in the same text: seq-rep-4 of Welleck et al., 2020."""
    return 1 - distinct(tokens, 4)


@dataclass(frozen=True)
class BigramCritic:
    """A bigram model of action sequences with Witten-Bell smoothing, which has nothing to tune.

    `P(a|b) = (c(ba) + T(b) P(a)) / (c(b) + T(b))` with T(b) the number of different actions seen after b, and
    `P(a) = (c(a) + 1) / (N + K)`.

    Attributes:
        pairs: sorted codes `b K + a` of the pairs seen.
        counts: of each pair.
        seen: c(b), how often each action was followed by any, `[K]`.
        kinds: T(b), `[K]`.
        unigram: P(a), `[K]`.
    """

    pairs: np.ndarray
    counts: np.ndarray
    seen: np.ndarray
    kinds: np.ndarray
    unigram: np.ndarray

    @classmethod
    def fit(cls, tables: Iterator[pa.Table], num_actions: int) -> BigramCritic:
        """Count the pairs within each document.

        Args:
            tables: documents with their `actions`.
            num_actions: K.
        """
        codes, single = [np.zeros(0, np.int64)], np.zeros(num_actions)
        for table in tables:
            actions = joined(table["actions"]).astype(np.int64)
            lengths = pa.compute.list_value_length(table["actions"]).to_numpy()
            single += np.bincount(actions, minlength=num_actions)
            within = np.ones(len(actions), dtype=bool)
            within[np.cumsum(lengths)[lengths > 0] - 1] = False  # a document's last sentence has none after it
            codes.append(actions[within] * num_actions + actions[np.flatnonzero(within) + 1])
        pairs, counts = np.unique(np.concatenate(codes), return_counts=True)
        before = pairs // num_actions
        seen = np.bincount(before, weights=counts, minlength=num_actions)
        kinds = np.bincount(before, minlength=num_actions).astype(np.float64)
        return cls(pairs, counts, seen, kinds, (single + 1) / (single.sum() + num_actions))

    def nll(self, before: int, actions: Sequence[int]) -> float:
        """Negative log-likelihood (nats) of a sequence behind the action `before`."""
        after = np.array(actions, dtype=np.int64)
        first = np.array([before, *actions], dtype=np.int64)[: len(after)]
        codes = first * len(self.unigram) + after
        at = np.searchsorted(self.pairs, codes).clip(max=max(0, len(self.pairs) - 1))
        count = np.where(self.pairs[at] == codes, self.counts[at], 0) if len(self.pairs) else np.zeros(len(codes))
        kinds, seen = self.kinds[first], self.seen[first]
        smoothed = (count + kinds * self.unigram[after]) / np.maximum(seen + kinds, 1)
        return float(-np.log(np.where(seen > 0, smoothed, self.unigram[after])).sum())


def num_clusters(num_texts: int) -> int:
    """Clusters of MAUVE, as mauve-text chooses them: a tenth of the texts, at least two."""
    return max(2, round(num_texts / 10))


def mauve(features: np.ndarray, references: np.ndarray, seed: int) -> float:
    """MAUVE (Pillutla et al., 2021), by mauve-text, of texts against the true ones: 1 where nothing tells them apart.

    Args:
        features: `[n, A]` of the texts.
        references: `[n, A]` of the true continuations.
        seed: of k-means.
    """
    from mauve.compute_mauve import compute_mauve

    with _silence():
        found = compute_mauve(
            p_features=references, q_features=features, num_buckets=num_clusters(len(features)), seed=seed
        )
    return float(found.mauve)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Close stderr to faiss, which says at each of hundreds of runs that there are few texts a cluster."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
