"""Documents' sentences in the sequences of the planner.

R sequences of n positions, D documents, A dimensions of an embedding.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from planlm.corpus.offsets import ALIKE, document_offsets, few_sizes
from planlm.corpus.packing import fill, packs


class Layout:
    """Where the sentences of a batch's documents stand in the planner's R sequences of n positions.

    As many full sequences, a power of two, as the longest document leaves; how long they are is one of few sizes too.
    Or all in one sequence, a power of two long, so that nearly all batches have one shape.

    Args:
        lengths: [D] sentences of each document, at least 1.
        most: so many sentences no document of any batch exceeds: in one sequence; 0: in several.

    Attributes:
        shape: (R, n).
        begins: [D], position of each document's first sentence in all sequences, one behind the other.
    """

    def __init__(self, lengths: np.ndarray, most: int = 0) -> None:
        self._lengths, self._most = lengths, most and few_sizes(most, ALIKE)
        self.shape, self.begins = _in_one(lengths) if most else _in_rows(lengths)
        self._numbers = np.concatenate([np.arange(length) for length in lengths])  # of each sentence in its document
        self._at = np.repeat(self.begins, lengths) + self._numbers

    def positions(self) -> Tensor:
        """[R, n] int64, number of each sentence in its document; 0 on padding."""
        return self._placed(self._at, self._numbers, 0)

    def offsets(self) -> tuple[Tensor, int]:
        """What `document_offsets` gives; padding behind the documents of each of several sequences counts as one more.

        In one sequence the longest is `most`, whatever the batch holds, so that batches are alike, and padding counts
        as documents of at most that length: attention launches blocks for the longest of each, and computes padding.
        """
        begins = np.zeros(self.shape, dtype=bool)
        begins.flat[self.begins] = True
        ends = self.begins + self._lengths
        begins.flat[ends[ends < begins.size]] = True
        if not self._most:
            return document_offsets(begins)
        begins.flat[ends[-1] :: self._most] = True
        return document_offsets(begins, ALIKE)[0], min(self.shape[1], self._most)

    def embeddings(self, embeddings: list[np.ndarray]) -> Tensor:
        """[R, n, A] float32, at each position the embedding of the sentence before; 0 where there is none."""
        before = [one[: length - 1] for one, length in zip(embeddings, self._lengths, strict=True)]
        return self._placed(self._at[self._numbers > 0], np.concatenate(before, dtype=np.float32), 0)

    def own(self, embeddings: list[np.ndarray]) -> Tensor:
        """[R, n, A] float32, each sentence's own embedding; 0 on padding."""
        return self._placed(self._at, np.concatenate(embeddings, dtype=np.float32), 0)

    def actions(self, actions: list[np.ndarray], padding: int) -> Tensor:
        """[R, n] int64, action of each sentence."""
        return self._placed(self._at, np.concatenate(actions, dtype=np.int64), padding)

    def _placed(self, at: np.ndarray, values: np.ndarray, padding: int) -> Tensor:
        shape = values.shape[1:]
        placed = np.full((self.shape[0] * self.shape[1], *shape), padding, dtype=values.dtype)
        placed[at] = values
        return torch.from_numpy(placed.reshape(*self.shape, *shape))


def _in_one(lengths: np.ndarray) -> tuple[tuple[int, int], np.ndarray]:
    return (1, few_sizes(int(lengths.sum()), ALIKE)), np.cumsum(lengths) - lengths


def _in_rows(lengths: np.ndarray) -> tuple[tuple[int, int], np.ndarray]:
    count = 1 << (int(lengths.sum() // lengths.max()).bit_length() - 1)
    width = few_sizes(-(-int(lengths.sum()) // count))
    while sum(alike for alike, _ in packs(lengths, width)) > count:
        width = few_sizes(width + 1)
    members, first = fill(packs(lengths, width), lengths, np.random.default_rng(0))
    begins = np.empty_like(lengths)
    for number, (begin, end) in enumerate(itertools.pairwise(first)):
        inside = members[begin:end]
        begins[inside] = number * width + np.cumsum(lengths[inside]) - lengths[inside]
    return (count, width), begins
