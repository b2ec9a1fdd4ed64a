"""Packing: every window once, in rows that fit, with little padding."""

from __future__ import annotations

import numpy as np
import pytest

from planlm.corpus.packing import fill, packs


def random_lengths(seed: int, window: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, window + 1, 500)


@pytest.mark.parametrize("window", [1, 7, 64])
@pytest.mark.parametrize("seed", range(4))
def test_rows_hold_every_length_once_and_fit(seed: int, window: int) -> None:
    lengths = random_lengths(seed, window)
    rows = packs(lengths, window)
    assert all(count > 0 and sum(members) <= window for count, members in rows)
    held = [length for count, members in rows for length in members * count]
    assert sorted(held) == sorted(lengths.tolist())


def test_lengths_of_wikipedia_s_kind_leave_less_than_three_percent() -> None:
    """Log-normal documents, cut into windows: the remainders fill each other's rows."""
    documents = np.random.default_rng(0).lognormal(5.5, 1.0, 5000).astype(int) + 2
    for window in (128, 1024):
        lengths = np.concatenate([np.full(n // window, window) for n in documents] + [documents % window])
        rows = packs(lengths[lengths > 0], window)
        assert 1 - lengths.sum() / (window * sum(count for count, _ in rows)) < 0.03


def test_no_window_needs_no_row() -> None:
    assert packs(np.zeros(0, dtype=np.int64), 8) == []
    members, first = fill([], np.zeros(0, dtype=np.int64), np.random.default_rng(0))
    assert len(members) == 0 and first.tolist() == [0]


def test_every_window_is_drawn_once_and_others_meet_in_every_epoch() -> None:
    lengths = random_lengths(0, 32)
    rows = packs(lengths, 32)
    epochs = [fill(rows, lengths, np.random.default_rng(seed)) for seed in (0, 1)]
    for members, first in epochs:
        assert sorted(members.tolist()) == list(range(len(lengths)))
        sums = np.add.reduceat(lengths[members], first[:-1])
        assert len(sums) == sum(count for count, _ in rows) and sums.max() <= 32
    assert not np.array_equal(epochs[0][0], epochs[1][0])
