"""The providers compute the same block, its inputs are what they are said to be, and its work is counted right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.block import (
    SHAPES,
    Block,
    Provider,
    Shape,
    Work,
    compulsory,
    forward_backward,
    planlm,
    setup,
    strong_eager,
    token_level,
)
from benchmarks.correctness import relative_error


@pytest.mark.parametrize("provider", [token_level, planlm])
def test_providers_agree_in_float64(block: Block, provider: Provider) -> None:
    double = block.in_float64()
    want, got = forward_backward(strong_eager, double), forward_backward(provider, double)
    for wanted, found in zip((*want[0], *want[1]), (*got[0], *got[1]), strict=True):
        assert relative_error(found, wanted) < 1e-12


@pytest.mark.parametrize("provider", [token_level, strong_eager, planlm])
def test_tokens_without_a_plan_keep_their_state(block: Block, provider: Provider) -> None:
    unplanned = block.segment_ids < 0
    for state, output in zip(block.states, provider(block), strict=True):
        assert torch.equal(output[unplanned], state[unplanned])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_ids_are_sorted_and_cover_every_sentence(shape: Shape) -> None:
    light = replace(shape, num_actions=1, size=1, num_layers=1, width=1)
    ids = setup(light, torch.float32, torch.device("cpu")).segment_ids
    assert ids.shape == (shape.num_tokens,)
    assert (ids < 0).sum() == shape.num_tokens // 64
    planned = ids[ids >= 0]
    assert planned.diff().min() >= 0
    lengths = planned.bincount()
    assert len(lengths) == shape.num_sentences
    assert lengths.min() >= 1 and lengths.max() > 2 * lengths.double().mean()


def test_the_set_up_is_the_same_each_time(block: Block) -> None:
    again = setup(block.shape, torch.float32, torch.device("cpu"))
    assert torch.equal(block.segment_ids, again.segment_ids)
    for left, right in zip(block.leaves().values(), again.leaves().values(), strict=True):
        assert torch.equal(left, right)


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
