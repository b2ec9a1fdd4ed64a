"""The gate: what is wrong is named and never timed; what does not fit into memory is said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import harness, kernels
from benchmarks.block import PROVIDERS, Block, Shape, planlm, setup, strong_eager, token_level
from benchmarks.correctness import check
from benchmarks.harness import CPU, Budget, WrongResultError


def wrong_output(block: Block) -> Sequence[Tensor]:
    """One value of the second layer is off."""
    outputs = strong_eager(block)
    nudge = torch.zeros_like(outputs[1])
    nudge[3, 2] = 0.01
    return [outputs[0], outputs[1] + nudge, *outputs[2:]]


def wrong_gradient(block: Block) -> Sequence[Tensor]:
    """The values are right and the codebook's gradient is a tenth too large."""
    value = block.codebook
    scaled = 1.1 * value - 0.1 * value.detach()
    return strong_eager(Block(**{**vars(block), "codebook": scaled}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_passes(tiny: Shape, dtype: torch.dtype) -> None:
    block = setup(tiny, dtype, CPU)
    assert check(block, {"token-level": token_level, "strong eager": strong_eager, "planlm": planlm}) == []


def test_a_failure_names_provider_tensor_and_error(block: Block) -> None:
    with pytest.raises(WrongResultError, match=r"tiny .*: planlm: y\[1\]: relative error .*e-0., tolerance 1.00e-05"):
        check(block, {"planlm": wrong_output})
    with pytest.raises(WrongResultError, match=r"compiled: gradient of codebook: relative error 1.00e-01"):
        check(block, {"compiled": wrong_gradient})


def test_in_bf16_planlm_is_held_to_strong_eagers_own_error(tiny: Shape) -> None:
    block = setup(tiny, torch.bfloat16, CPU)
    with pytest.raises(WrongResultError, match=r"planlm: gradient of codebook"):
        check(block, {"planlm": wrong_gradient})


def test_nothing_is_timed_after_a_failure(
    measured_here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PROVIDERS, "planlm", wrong_output)
    monkeypatch.setattr(harness, "interleaved", lambda *_: pytest.fail("timed"))
    assert kernels.main(["--shapes", "tiny", "--dtypes", "float32", "--providers", "strong eager,planlm"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1].startswith("wrong result: tiny torch.float32: planlm: y[1]")


def test_out_of_memory_is_a_result(measured_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(block: Block) -> Sequence[Tensor]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setitem(PROVIDERS, "token-level", exhausted)
    rows = kernels.measure("default", "float32", "tiny", ("token-level", "strong eager"), CPU, Budget(3, 1.0))
    assert [row.status for row in rows] == ["out of memory", "ok"]


def test_memory_beyond_what_is_free_is_refused_before_it_is_touched() -> None:
    script = """
import os, torch
from benchmarks.kernels import refuse_beyond_memory
refuse_beyond_memory()
free = next(int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
first = torch.empty(600 * free, dtype=torch.uint8)
try:
    torch.empty(600 * free, dtype=torch.uint8)
except RuntimeError as error:
    assert "can't allocate memory" in str(error)
    print("refused")
"""
    if not Path("/proc/meminfo").exists():
        pytest.skip("the limit is set on Linux only")
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=False)
    assert done.stdout == "refused\n", done.stderr
