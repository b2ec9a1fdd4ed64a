"""A block small enough for every test."""

from __future__ import annotations

import pytest
import torch

from benchmarks.blocks import Block, Shape, setup

TINY = Shape("tiny", num_sentences=40, num_actions=200, size=48, num_layers=3, width=64, num_tokens=600)


@pytest.fixture
def tiny() -> Shape:
    """Small, and large enough that rounding to bf16 averages out."""
    return TINY


@pytest.fixture
def block() -> Block:
    """The tiny block in float32."""
    return setup(TINY, torch.float32, torch.device("cpu"))
