"""Peak memory against allocations that are known."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import CPU
from benchmarks.memory import peak_memory

MEBI = 2**20


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
