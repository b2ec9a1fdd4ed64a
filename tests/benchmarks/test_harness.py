"""Order and number of repetitions, ratios, and processes of their own."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from benchmarks.harness import CPU, Budget, Row, in_new_process, interleaved, paired, read_rows
from planlm.errors import InputError, MachineError


def test_providers_take_turns() -> None:
    calls: list[str] = []
    times = interleaved({name: partial(calls.append, name) for name in "ABC"}, CPU, Budget(repetitions=4, seconds=9))
    assert "".join(calls) == "A" * 10 + "B" * 10 + "C" * 10 + "ABC" * 4, "some are not counted, then they take turns"
    assert [len(spent) for spent in times.values()] == [4, 4, 4]


@pytest.mark.parametrize(
    ("times", "spent"), [([9.0, 9.0], False), ([9.0] * 3, True), ([0.1] * 5, True), ([0.1] * 4, False)]
)
def test_a_budget_is_repetitions_or_seconds_but_three_at_least(times: list[float], spent: bool) -> None:
    assert Budget(repetitions=5, seconds=10).spent(times) == spent


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that gets slower in the middle slows both down, and the ratio stays."""
    ours, theirs = [1.0, 1.0, 8.0, 8.0, 9.0], [2.0, 2.0, 16.0, 16.0, 10.0, 1.0]
    assert paired(ours, theirs)["median"] == 0.5


def test_a_function_runs_in_a_process_of_its_own_and_its_errors_come_back() -> None:
    assert in_new_process(os.getpid) != os.getpid()
    with pytest.raises(InputError, match="expected rows that --out wrote"):
        in_new_process(read_rows, Path("missing.jsonl"), Row)


def test_a_process_that_is_killed_is_one_line() -> None:
    with pytest.raises(MachineError, match="ended with status 9"):
        in_new_process(os._exit, 9)
