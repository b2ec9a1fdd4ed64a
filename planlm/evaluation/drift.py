"""How far the actions of texts are from those of a corpus, and how far as much of the corpus itself would be.

Sizes: n texts, N sentences, K actions, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import csr_array  # type: ignore[import-untyped]
from scipy.special import rel_entr  # type: ignore[import-untyped]

from planlm.corpus.writing import joined
from planlm.evaluation.significance import bootstrap_intervals

DISTANCES = ("total_variation", "jensen_shannon")
"""Names of what `distances` gives."""

TOP_ACTIONS = 5
"""Actions shown of those that rose, and of those that fell."""

QUANTILE = 0.95
"""Of what chance does."""

LEVEL = 0.05
"""Share of samples of the corpus that may be as far before a distance is called a drift."""


@dataclass(frozen=True)
class Sequences:
    """The actions of texts, or of documents, one behind the other.

    Attributes:
        actions: int64 `[N]`.
        lengths: sentences of each, at least 1, int64 `[n]`.
    """

    actions: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def of_documents(cls, tables: Iterator[pa.Table]) -> Sequences:
        """Those of a corpus's documents, by their column `actions`."""
        actions, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for table in tables:
            actions.append(joined(table["actions"]).astype(np.int64))
            lengths.append(pa.compute.list_value_length(table["actions"]).to_numpy().astype(np.int64))
        of_each = np.concatenate(lengths)
        return cls(np.concatenate(actions), of_each[of_each > 0])

    @property
    def begins(self) -> NDArray[np.int64]:
        """Where each begins, `[n]`."""
        return np.cumsum(self.lengths) - self.lengths

    def counts(self, num_actions: int) -> csr_array:
        """How often each has each action, sparse `[n, K]`."""
        owners = np.repeat(np.arange(len(self.lengths)), self.lengths)
        return csr_array((np.ones(len(owners)), (owners, self.actions)), shape=(len(self.lengths), num_actions))

    def repeats(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """How many neighbours in each are of the same action, and how many neighbours there are, `[n]` each."""
        same = np.zeros(len(self.actions))
        same[1:] = self.actions[1:] == self.actions[:-1]
        same[self.begins] = 0
        return np.add.reduceat(same, self.begins), (self.lengths - 1).astype(np.float64)


def shares_of(actions: NDArray[np.int64], num_actions: int) -> NDArray[np.float64]:
    """Share of each of K actions, `[K]`."""
    return np.bincount(actions, minlength=num_actions) / len(actions)


def distances(shares: NDArray[np.float64], corpus: NDArray[np.float64]) -> NDArray[np.float64]:
    """Total variation and Jensen-Shannon distance (root of the divergence in bits), both from 0 to 1.

    Args:
        shares: `[R, K]`, each adding up to 1.
        corpus: `[K]`.

    Returns:
        `[R, 2]`.
    """
    between = (shares + corpus) / 2
    divergence = (rel_entr(shares, between) + rel_entr(corpus, between)).sum(axis=1) / (2 * math.log(2))
    return np.stack([np.abs(shares - corpus).sum(axis=1) / 2, np.sqrt(divergence.clip(0))], axis=1)


def drift(
    counts: csr_array,
    places: NDArray[np.int64],
    corpus: Sequences,
    labels: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any] | None:
    """The distance of texts' actions to a corpus's, beside what chance does.

    A distance has no interval: sampling adds to it, with many actions more than it is itself, so that a bootstrap's
    does not cover it. Those of single actions are percentiles of a bootstrap over texts.

    Args:
        counts: sparse `[n, K]`, how many sentences of each text have each action; of a plan, its probabilities.
        places: number of the first of these sentences in its text, `[n]`.
        corpus: of the corpus's documents.
        labels: of the K actions, empty for one without.
        resamples: draws of texts, and samples of the corpus.
        seed: of both.

    Returns:
        `texts`, `sentences`; by name of `DISTANCES` its `value`, `chance` (mean) and `chance95` (95th percentile, of
        samples of the corpus), `p` (share of them that are as far) and `verdict`;
        `actions`, those that rose and fell most, in this order, and `change95`, the 95th percentile of the largest
        change in a sample. None where there is no sentence.
    """
    lengths = np.rint(counts.sum(axis=1)).astype(np.int64)
    counts, places, lengths = counts[lengths > 0], places[lengths > 0], lengths[lengths > 0]
    if not len(lengths):
        return None
    background = shares_of(corpus.actions, len(labels))
    totals = np.asarray(counts.sum(axis=0))
    shares = totals / totals.sum()
    change = shares - background
    order = np.argsort(-change, kind="stable")
    shown = [*(one for one in order[:TOP_ACTIONS] if change[one] > 0)]
    shown += [one for one in order[-TOP_ACTIONS:] if change[one] < 0]

    def statistics(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        rows = drawn + np.arange(len(drawn))[:, None] * drawn.shape[1]
        weights = np.bincount(rows.ravel(), minlength=drawn.size).reshape(drawn.shape)  # how often a text was drawn
        totals = np.asarray((counts.T @ weights.T).T)
        parts = totals / totals.sum(axis=1, keepdims=True)  # [r, K]
        return (parts - background)[:, shown]

    ends = bootstrap_intervals(statistics, len(lengths), resamples=resamples, seed=seed)
    chance = _samples(corpus, places, lengths, background, resamples, seed)
    result: dict[str, Any] = {"texts": len(lengths), "sentences": int(lengths.sum())}
    for column, name in enumerate(DISTANCES):
        value = float(distances(shares[None], background)[0, column])
        result[name] = _against_chance(value, chance[:, column])
    result["actions"] = [
        {
            "action": int(action),
            "label": labels[action] or None,
            "texts": float(shares[action]),
            "corpus": float(background[action]),
            "change": float(change[action]),
            "ci95": None if ends is None else ends[:, at].tolist(),
        }
        for at, action in enumerate(shown)
    ]
    return result | {"change95": float(np.quantile(chance[:, -1], QUANTILE))}


def _against_chance(value: float, chance: NDArray[np.float64]) -> dict[str, Any]:
    p = (1 + int((chance >= value).sum())) / (1 + len(chance))
    return {
        "value": value,
        "chance": float(chance.mean()),
        "chance95": float(np.quantile(chance, QUANTILE)),
        "p": p,
        "verdict": "drift" if p <= LEVEL else "no more than chance",
    }


def _samples(
    corpus: Sequences,
    places: NDArray[np.int64],
    lengths: NDArray[np.int64],
    background: NDArray[np.float64],
    resamples: int,
    seed: int,
) -> NDArray[np.float64]:
    """Distances to a corpus of samples of it, and the largest change of an action in each, `[R, 3]`.

    A sample has for each text as many sentences of a document, from the same place on, since sentences of a text are
    alike, and those at the beginning of documents unlike others. Every document that reaches so far is as likely as any
    other; where none does, one that ends earlier is followed by another, from its own beginning on.
    """
    generator, begins = np.random.default_rng(seed), corpus.begins
    by_length = np.argsort(corpus.lengths, kind="stable")
    ordered = corpus.lengths[by_length]
    reached = np.where(places < ordered[-1], places, 0)
    found = np.empty((resamples, len(DISTANCES) + 1))
    for row in found:
        actions, at, left = [], reached, lengths
        while len(left):
            # Documents that reach to the text's end, where there are such; else those that reach to its beginning.
            longer = np.where(at + left <= ordered[-1], at + left - 1, at)
            document = by_length[generator.integers(np.searchsorted(ordered, longer, side="right"), len(ordered))]
            taken = np.minimum(left, corpus.lengths[document] - at)
            first = np.repeat(begins[document] + at - (np.cumsum(taken) - taken), taken)
            actions.append(corpus.actions[first + np.arange(len(first))])
            left = (left - taken)[taken < left]
            at = np.zeros_like(left)
        shares = shares_of(np.concatenate(actions), len(background))
        row[:] = [*distances(shares[None], background)[0], np.abs(shares - background).max()]
    return found
