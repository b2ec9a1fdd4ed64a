"""The floor counts what it says, and nothing else."""

from __future__ import annotations

import pytest
import torch

from benchmarks.blocks import SHAPES, Shape
from benchmarks.floor import Rates, Work, compulsory


def test_bytes_and_flops_of_a_block_added_up_by_hand() -> None:
    shape = Shape("hand", num_sentences=2, num_actions=30, size=5, num_layers=2, width=7, num_tokens=11)
    logits, codebook, weight, bias, states, projected = 2 * 30, 30 * 5, 14 * 5, 14, 11 * 14, 2 * 14
    read = logits + codebook + weight + bias + states + states + logits + codebook + weight
    written = projected + states + logits + codebook + weight + bias
    assert compulsory(shape, torch.float32) == Work(
        flops=3 * 2 * (2 * 30 * 5 + 2 * 5 * 14), bytes=4 * (read + written) + 8 * 11
    )
    ids = 8 * 11
    assert 2 * (compulsory(shape, torch.bfloat16).bytes - ids) == compulsory(shape, torch.float32).bytes - ids


@pytest.mark.parametrize(("name", "cheaper"), [("gpt2", "mixture"), ("large-K", "mixture"), ("long", "codebook")])
def test_flops_are_those_of_the_cheaper_association(name: str, cheaper: str) -> None:
    shape = SHAPES[name]
    s, k, a, d = shape.num_sentences, shape.num_actions, shape.size, shape.plan_size
    counts = {"mixture": s * k * a + s * a * d, "codebook": k * a * d + s * k * d}
    assert compulsory(shape, torch.float32).flops == 6 * min(counts.values()) == 6 * counts[cheaper]


def test_the_floor_adds_what_a_roofline_overlaps() -> None:
    rates, work = Rates(flops=10.0, bytes=4.0), Work(flops=20, bytes=4)
    assert (rates.floor(work), rates.roofline(work)) == (3.0, 2.0)
