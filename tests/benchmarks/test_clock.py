"""Order and number of repetitions, and peak memory against allocations that are known."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.cases import paired
from benchmarks.clock import Budget, interleaved, peak_memory

CPU = torch.device("cpu")
MEBI = 2**20


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


def test_results_are_not_counted_and_temporaries_are_at_their_peak() -> None:
    def run() -> list[Tensor]:
        gone = [torch.ones(MEBI), torch.ones(MEBI)]  # 8 MiB
        total = gone[0] + gone[1]  # a result
        del gone
        later = torch.ones(MEBI)  # 4 MiB, when 8 have gone
        return [total, later * 2]

    exact, _ = peak_memory(run, CPU)
    assert exact == 8 * MEBI


def test_a_result_that_keeps_more_alive_than_its_own_bytes_is_charged_for_it() -> None:
    exact, _ = peak_memory(lambda: [torch.ones(4 * MEBI)[:MEBI]], CPU)
    assert exact == 12 * MEBI


def test_saved_tensors_of_autograd_are_seen() -> None:
    x = torch.randn(512, 1024, requires_grad=True)  # 2 MiB

    def run() -> list[Tensor]:
        y = x.softmax(dim=1).exp()
        return [y, *torch.autograd.grad(y, x, torch.ones_like(y))]

    exact, process = peak_memory(run, CPU)
    # Alive at once beyond y and the gradient: the softmax, ones, and their product with the exponential.
    assert exact == 6 * MEBI
    assert process is None or process < 64 * MEBI


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that gets slower in the middle slows both down, and the ratio stays."""
    ours, theirs = [1.0, 1.0, 8.0, 8.0, 9.0], [2.0, 2.0, 16.0, 16.0, 10.0, 1.0]
    assert paired(ours, theirs)["median"] == 0.5
