"""Several short windows in one sequence: which lengths go together, and which windows that are in an epoch."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

Packs = list[tuple[int, tuple[int, ...]]]
"""(number of sequences, lengths of the windows in each of them)."""


def packs(lengths: np.ndarray, window: int) -> Packs:
    """Best-fit decreasing on the histogram of lengths: its time does not depend on how many windows there are.

    After Krell et al., "Efficient sequence packing without cross-contamination" (2021), section 3.

    Args:
        lengths: [n] of the windows, 1 to `window`.
        window: W, positions of a sequence.

    Returns:
        Sequences that hold every window once.
    """
    histogram = np.bincount(lengths, minlength=window + 1)
    open_: dict[int, Packs] = defaultdict(list)  # by the positions that are free in them
    for length in range(window, 0, -1):
        left = int(histogram[length])
        while left:
            free = min((free for free, found in open_.items() if free >= length and found), default=None)
            if free is None:
                each = min(left, window // length)
                open_[window - each * length].append((left // each, (length,) * each))
                left %= each
            else:
                count, members = open_[free].pop()
                used = min(count, left)
                if count > used:
                    open_[free].append((count - used, members))
                open_[free - length].append((used, (*members, length)))
                left -= used
    return [pack for free in sorted(open_) for pack in open_[free]]


def fill(packs: Packs, lengths: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the windows of every sequence: any of the right length.

    Returns:
        (numbers of the windows, sequence after sequence and in random order within one; where each sequence begins in
        them, and the end of the last).
    """
    order = random.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]  # by length, random among equals
    next_of = np.searchsorted(lengths[order], np.arange(lengths.max(initial=0) + 2))
    sequence_of = np.empty(len(lengths), dtype=np.int64)  # of each entry of `order`
    first = 0
    for count, members in packs:
        for length in members:
            sequence_of[next_of[length] : next_of[length] + count] = np.arange(first, first + count)
            next_of[length] += count
        first += count
    by_sequence = np.lexsort((random.permutation(len(lengths)), sequence_of))
    return order[by_sequence], np.searchsorted(sequence_of[by_sequence], np.arange(first + 1))
