"""The faster parts of an LM compute what transformers' own do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from planlm import speedups
from planlm.kernels import has_packed_attention, use_backend
from planlm.model.attention import take_plans
from planlm.speedups.lm import TanhGELU, document_starts

CPU = torch.device("cpu")
FAMILIES = ("gpt2", "llama")


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the switch says: these are the tests of the pieces."""
    monkeypatch.setattr(speedups, "ON", set(speedups.PIECES))


def starts_of(lm: PreTrainedModel, positions: Tensor) -> Tensor | None:
    """As a forward pass in bf16 asks for them."""
    with torch.autocast("cpu", torch.bfloat16):
        return document_starts(lm, positions)


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, lm_folder: Callable[[str], str]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """An LM as transformers has it, and a faster one."""
    plain, fast = (AutoModelForCausalLM.from_pretrained(lm_folder(request.param)).eval() for _ in range(2))
    speedups.apply(fast)
    take_plans(fast)
    return plain, fast


def test_float32_evaluates_bit_for_bit(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    ids = torch.randint(300, (2, 10))
    with torch.no_grad():
        plain, fast = (lm(ids).logits for lm in pair)
    assert torch.equal(plain, fast)


def test_gradients_are_those_of_transformers(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    ids = torch.randint(300, (2, 10))
    for lm in pair:
        lm(ids).logits.float().logsumexp(-1).sum().backward()
    for (name, mine), theirs in zip(pair[1].named_parameters(), pair[0].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.skipif(not has_packed_attention(CPU, torch.bfloat16), reason="no bf16 products here")
def test_packed_rows_in_bf16_are_those_of_masked_attention(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    ids = torch.randint(300, (2, 12))
    positions = torch.cat((torch.arange(7), torch.arange(5))).expand(2, 12)
    _, lm = pair
    starts = starts_of(lm, positions)
    assert starts is not None and starts[0, 0, :, 0].tolist() == [0] * 7 + [7] * 5
    assert torch.equal(starts, starts_of(lm, positions + 3))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        packed = lm(ids, attention_mask=starts, position_ids=positions, use_cache=False).logits
        masked = lm(ids, position_ids=positions, use_cache=False).logits
        alone = lm(ids[:, 7:], use_cache=False).logits
        other = lm(ids.roll(1, 1), use_cache=False).logits
    assert (packed - masked).norm() < 0.02 * masked.norm() and (packed[:, 7:] - alone).norm() < 0.02 * alone.norm()
    assert (packed - other).norm() > 0.2 * other.norm()


def test_transformers_masks_serve_where_the_kernel_does_not(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    _, lm = pair
    positions = torch.arange(4).expand(1, 4)
    assert document_starts(lm, positions) is None, "in float32"
    with use_backend("reference"):
        assert starts_of(lm, positions) is None
    lm.train()
    if "attn_pdrop" in lm.config.to_dict():
        lm.config.attn_pdrop = 0.1
    else:
        lm.config.attention_dropout = 0.1
    assert starts_of(lm, positions) is None


def test_activation_keeps_one_matrix() -> None:
    kept: list[torch.Size] = []
    x = torch.randn(3, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        TanhGELU()(x)
    assert kept == [x.shape]


SWITCHED_OFF = """
import sys, torch
from torch.profiler import profile
from planlm.model import PlanLMForCausalLM
model = PlanLMForCausalLM.from_lm(sys.argv[1], torch.randn(7, 16), conditioned_layers=2, selection="none")
ids = torch.randint(300, (2, 10))
with torch.autocast("cpu", torch.bfloat16), profile() as profiler:
    positions = torch.cat((torch.arange(6), torch.arange(4))).expand(2, 10)
    model(ids, position_ids=positions, shift_labels=ids, use_cache=False).nll_sum.backward()
print({event.name for event in profiler.events() if event.name in ("aten::gelu", "aten::tanh")})
print({event.name for event in profiler.events() if event.name.startswith("planlm::")})
"""


@pytest.mark.skipif(not has_packed_attention(CPU, torch.bfloat16), reason="no bf16 products here")
@pytest.mark.parametrize("switch", ["0", "1"])
def test_one_switch_turns_all_of_it_off(switch: str, lm_folder: Callable[[str], str]) -> None:
    """What runs in a training step on packed documents, by torch's profiler."""
    command = [sys.executable, "-c", SWITCHED_OFF, lm_folder("gpt2")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PLANLM_SPEEDUPS": switch})
    assert done.returncode == 0, done.stderr
    activation, operators = done.stdout.splitlines()
    assert activation == str({"aten::tanh" if switch == "0" else "aten::gelu"})
    assert ("packed_attention" in operators) == ("cross_entropy_" in operators) == (switch == "1")
    assert switch == "1" or operators == "set()"
