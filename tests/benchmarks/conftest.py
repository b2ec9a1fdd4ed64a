"""A block small enough for every test, and the command that measures it in the test's process."""

from __future__ import annotations

import pytest
import torch

from benchmarks import block as blocks
from benchmarks import harness, kernels
from benchmarks.block import SHAPES, Block, Rates, Shape, setup

TINY = Shape("tiny", num_sentences=40, num_actions=200, size=48, num_layers=3, width=64, num_tokens=600)


@pytest.fixture
def tiny() -> Shape:
    """Small, and large enough that rounding to bf16 averages out."""
    return TINY


@pytest.fixture
def block() -> Block:
    """The tiny block in float32."""
    return setup(TINY, torch.float32, torch.device("cpu"))


@pytest.fixture
def measured_here(tiny: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks.kernels` knows the tiny shape, and measures in this process, at rates that are not measured."""
    monkeypatch.setitem(SHAPES, "tiny", tiny)
    monkeypatch.setattr(harness, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(blocks, "measure_rates", lambda *_: Rates(1e9, 1e9))
    monkeypatch.setattr(kernels, "refuse_beyond_memory", lambda: None)
