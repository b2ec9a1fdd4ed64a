"""Llama's parts for those who count: operators that CUDA would have, each seen once, on any device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from planlm import speedups
from planlm.speedups import llama
from planlm.speedups.counted import parts_as_on_cuda
from tests.speedups.test_llama import PARTS, only_here, step, tiny

__all__ = ["only_here"]


class Seen(TorchDispatchMode):
    """Names of the operators that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def masked_step(lm: PreTrainedModel) -> dict[str, Tensor]:
    """Logits and gradients, with a mask so that none is looked for in positions, which `meta` has not."""
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool, device=lm.device)
    logits = lm(torch.ones(2, 12, dtype=torch.int64, device=lm.device), attention_mask=mask, use_cache=False).logits
    lm.zero_grad()
    logits.sum().backward()
    return {"logits": logits, **{name: w.grad for name, w in lm.named_parameters() if w.grad is not None}}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo", "gpt2"])
def test_each_part_is_one_operator_forward_and_one_for_each_gradient(family: str, device: str) -> None:
    lm = tiny(family).to(device)
    speedups.apply(lm)
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in masked_step(lm).items()}
    with parts_as_on_cuda(), Seen() as seen:
        got = masked_step(lm)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in got.items()} == wanted
    norms, mlps, rotates = PARTS[family]
    ours = {name: number for name, number in seen.names.items() if name.startswith("planlm::llama")}
    # Of a norm the gradients of what it scales and of its weight; of the others one kernel writes them all.
    expected = {"norm": 3 * norms, "gate": 2 * mlps, "rotation": 2 * 2 * rotates}
    assert ours == {f"planlm::llama_{name}": number for name, number in expected.items() if number}
    if norms:
        assert not {"aten::rsqrt", "aten::silu", "aten::neg"} & set(seen.names)


def test_without_a_backward_pass_and_outside_nothing_is_replaced() -> None:
    lm = tiny("llama")
    want = step(lm)
    speedups.apply(lm)
    with parts_as_on_cuda(), torch.no_grad():
        inside = lm(torch.arange(24).view(2, 12) * 7 % 300).logits
    assert torch.equal(inside, lm(torch.arange(24).view(2, 12) * 7 % 300).logits)
    with pytest.raises(ZeroDivisionError), parts_as_on_cuda():
        _ = 1 / 0
    assert llama.stand_in is None
    got = step(lm)
    assert all(torch.equal(got[name], want[name]) for name in want)
