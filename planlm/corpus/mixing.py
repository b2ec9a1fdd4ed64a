"""Batches of several corpora at once, each with its share of the windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

from planlm.corpus.batches import PlanLoader
from planlm.corpus.packing import Packs, fill, packs
from planlm.errors import InputError


class _Part:
    """One of the corpora.

    Args:
        first: its first window.
        lengths: of its windows.
        packs: how they go together.

    Attributes:
        size: sequences that hold all of its windows once.
        count: its sequences in an epoch.
    """

    def __init__(self, first: int, lengths: np.ndarray, packs: Packs) -> None:
        self.first, self.lengths, self.packs = first, lengths, packs
        self.size = self.count = sum(count for count, _ in packs)

    def sequences(self, epoch: int, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Windows of the epoch's sequences, one behind the other, and how many each sequence has.

        All of them are gone through before one comes again; `key` and how often that was decide the order.
        """
        windows, counts = [], []
        at, end = epoch * self.count, (epoch + 1) * self.count
        while at < end:
            passed, begin = divmod(at, self.size)
            random = np.random.default_rng([*key, passed])
            members, first = fill(self.packs, self.lengths, random)
            chosen = random.permutation(self.size)[begin : begin + end - at]
            sizes = np.diff(first)[chosen]
            behind = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            windows.append(self.first + members[np.repeat(first[chosen], sizes) + behind])
            counts.append(sizes)
            at += len(chosen)
        return np.concatenate(windows), np.concatenate(counts)


class MixedLoader(PlanLoader):
    """Packed windows of several splits in random order; no sequence has windows of two.

    An epoch has each sequence of the first split once, and of every other one as many as its share of all asks for, at
    least one: it goes on from epoch to epoch, and is gone through anew, packed and ordered otherwise, at its end.

    Args:
        parts: splits of prepared corpora with the same actions, and their shares of the sequences, by what errors call
            them; documents are numbered through.
        window, batch_size, seed: of `PlanLoader`.
        options: further ones.

    Raises:
        InputError: nothing is predicted in one of them.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[datasets.Dataset, float]],
        *,
        window: int,
        batch_size: int,
        seed: int,
        **options: Any,
    ) -> None:
        splits, shares = zip(*parts.values(), strict=True)
        super().__init__(
            datasets.concatenate_datasets(splits), window=window, batch_size=batch_size, seed=seed, **options
        )
        ends = np.searchsorted(self.windows.document, np.cumsum([len(split) for split in splits])).tolist()
        self._parts: list[_Part] = []
        for name, share, begin, end in zip(parts, shares, [0, *ends], ends, strict=False):
            lengths = self.windows.length[begin:end]
            part = _Part(begin, lengths, packs(lengths, window))
            if part.size == 0:
                raise InputError(f"{name}: none of its documents has a second token to predict; give another corpus")
            if self._parts:
                part.count = max(1, round(self._parts[0].size * share / shares[0]))
            self._parts.append(part)
        self._num_items = sum(part.count for part in self._parts)

    def _order(self, random: np.random.Generator) -> np.ndarray:
        found = [part.sequences(self.epoch, (self._seed, number)) for number, part in enumerate(self._parts)]
        self._members = np.concatenate([windows for windows, _ in found])
        self._first = np.cumsum(np.concatenate([[0], *(counts for _, counts in found)]))
        return random.permutation(self._num_items)
