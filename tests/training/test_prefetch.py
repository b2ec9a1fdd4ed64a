"""Batches made ahead: in order, with the position of what was taken, and errors where the batch was asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from planlm.training.prefetch import Prefetch


class Counting:
    """A loader of three batches an epoch."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.epoch, self._next, self._fail_at = 0, 0, fail_at

    @property
    def num_batches(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        while self._next < 3:
            number = 3 * self.epoch + self._next
            if number == self._fail_at:
                raise OSError("shard gone")
            self._next += 1
            yield number
        self._next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "batch": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self._next = state["epoch"], state["batch"]


def test_batches_come_in_order_across_epochs_and_the_position_is_that_of_what_was_taken() -> None:
    with Prefetch(Counting(), ahead=4) as batches:
        assert batches.position == {"epoch": 0, "batch": 0}
        assert [next(batches) for _ in range(5)] == [0, 1, 2, 3, 4]
        assert batches.position == {"epoch": 1, "batch": 2}
    resumed = Counting()
    resumed.load_state_dict(batches.position)
    with Prefetch(resumed, ahead=1) as batches:
        assert next(batches) == 5


def test_an_error_reaches_whoever_asks_for_the_batch() -> None:
    with Prefetch(Counting(fail_at=1), ahead=4) as batches:
        assert next(batches) == 0
        with pytest.raises(OSError, match="shard gone"):
            next(batches)


def test_no_thread_is_left_behind() -> None:
    with Prefetch(Counting(), ahead=1) as batches:
        next(batches)
    assert not any(thread.name == "planlm-loader" for thread in threading.enumerate())
