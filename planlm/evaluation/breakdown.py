"""Where in documents, and in which documents, a plan is worth something: gains by sentence and by length.

Legend: n documents, P buckets of sentence numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planlm.evaluation.significance import DocumentScores, compare_rows

POSITIONS = ("1", "2", "3-4", "5-8", "9-16", "17-32", "33+")
"""Buckets of a sentence's number in its document, from 1."""

POSITION_EDGES = (2, 3, 5, 9, 17, 33)
"""The first number of each bucket but the first."""


@dataclass(frozen=True)
class SplitScores(DocumentScores):
    """Scores of documents, and what they are made of.

    Attributes:
        position_nll: nats, summed over a document's scored tokens in each bucket of sentences, `[n, P]` float64.
        position_tokens: scored tokens of each, `[n, P]` int64.
        seconds: that a process took per 1,000 tokens of the split, where that was measured.
    """

    position_nll: NDArray[np.float64]
    position_tokens: NDArray[np.int64]
    seconds: float = 0.0

    @classmethod
    def of_kept(cls, kept: Mapping[str, Any], plan: str) -> SplitScores:
        """A plan's from the `scores` of a split in evaluation.json; files of earlier versions have no positions."""
        positions = np.asarray(kept["position_nll"][plan]), np.asarray(kept["position_tokens"], dtype=np.int64)
        return cls(np.asarray(kept["nll"][plan]), np.asarray(kept["tokens"], dtype=np.int64), *positions)


def by_position(
    scores: Mapping[str, SplitScores], versus: str, *, resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of `compare_rows` for the tokens of each bucket of sentence numbers that has any.

    Args:
        scores: by name of the row; of one model under several plans, or of several models.
        versus, resamples, seed: see `compare_rows`.

    Returns:
        `bucket` and `rows` of each.
    """
    found = []
    for number, bucket in enumerate(POSITIONS):
        parts = {
            name: DocumentScores(row.position_nll[:, number], row.position_tokens[:, number])
            for name, row in scores.items()
        }
        if parts[versus].tokens.any():
            rows = compare_rows(parts, versus, resamples=resamples, seed=seed)
            found.append({"bucket": bucket, "rows": rows})
    return found


def by_length(
    scores: Mapping[str, DocumentScores], versus: str, *, resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """The same for a quarter of the documents each, by their number of scored tokens; equal numbers stay together."""
    tokens = scores[versus].tokens
    edges = np.quantile(tokens[tokens > 0], (0.25, 0.5, 0.75))
    quarter = np.where(tokens > 0, np.searchsorted(edges, tokens), -1)
    found = []
    for number in range(4):
        inside = quarter == number
        if inside.any():
            parts = {name: DocumentScores(row.nll_sum[inside], row.tokens[inside]) for name, row in scores.items()}
            rows = compare_rows(parts, versus, resamples=resamples, seed=seed)
            found.append({"bucket": f"{tokens[inside].min()}-{tokens[inside].max()}", "rows": rows})
    return found
