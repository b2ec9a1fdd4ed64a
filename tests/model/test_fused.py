"""The faster parts of an LM compute what transformers' own do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from planlm.kernels import has_packed_attention, use_backend
from planlm.model.attention import document_starts, take_plans
from planlm.model.fused import FusedGELU, FusedMLP, fuse

CPU = torch.device("cpu")
FAMILIES = ("gpt2", "llama")


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, lm_folder: Callable[[str], str]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """An LM as transformers has it, and fused."""
    plain, fused = (AutoModelForCausalLM.from_pretrained(lm_folder(request.param)).eval() for _ in range(2))
    fuse(fused)
    take_plans(fused)
    return plain, fused


def test_float32_evaluates_bit_for_bit(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    ids = torch.randint(300, (2, 10))
    with torch.no_grad():
        plain, fused = (lm(ids).logits for lm in pair)
    assert torch.equal(plain, fused)


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
    starts = document_starts(lm, positions, torch.bfloat16)
    assert starts is not None and starts[0, 0, :, 0].tolist() == [0] * 7 + [7] * 5
    assert torch.equal(starts, document_starts(lm, positions + 3, torch.bfloat16))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        packed = lm(ids, attention_mask=starts, position_ids=positions, use_cache=False).logits
        masked = lm(ids, position_ids=positions, use_cache=False).logits
        alone = lm(ids[:, 7:], use_cache=False).logits
        other = lm(ids.roll(1, 1), use_cache=False).logits
    assert (packed - masked).norm() < 0.02 * masked.norm() and (packed[:, 7:] - alone).norm() < 0.02 * alone.norm()
    assert (packed - other).norm() > 0.2 * other.norm()


def test_transformers_masks_serve_where_the_kernel_does_not(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    plain, lm = pair
    positions = torch.arange(4).expand(1, 4)
    assert document_starts(plain, positions, torch.bfloat16) is None
    assert document_starts(lm, positions, torch.float32) is None
    with use_backend("reference"):
        assert document_starts(lm, positions, torch.bfloat16) is None
    lm.train()
    if "attn_pdrop" in lm.config.to_dict():
        lm.config.attn_pdrop = 0.1
    else:
        lm.config.attention_dropout = 0.1
    assert document_starts(lm, positions, torch.bfloat16) is None


@pytest.mark.parametrize("trained", ["everything", "the input", "the weights"])
def test_feed_forward_half_keeps_what_enters_the_activation(trained: str) -> None:
    mlp = GPT2MLP(20, GPT2Config(n_embd=6, resid_pdrop=0.0)).requires_grad_(trained != "the input")
    x = torch.randn(2, 3, 6, requires_grad=trained != "the weights")
    inputs = [tensor for tensor in (x, *mlp.parameters()) if tensor.requires_grad]
    upstream = torch.randn(2, 3, 6)
    for dtype, within in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        found = []
        for module in (mlp, fused_mlp(mlp)):
            kept: list[torch.Size] = []
            hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=kept: kept.append(t.shape) or t, lambda t: t
            )
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), hooks:
                out = module(x)
            if module is not mlp:
                assert sum(20 in shape and 6 not in shape for shape in kept) == 1
            found.append([out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))])
        for mine, theirs in zip(*found, strict=True):
            assert mine.dtype == theirs.dtype
            assert (mine - theirs).norm() <= within * theirs.norm()


def fused_mlp(mlp: GPT2MLP) -> GPT2MLP:
    """The fused form on the same weights."""
    fused = copy.copy(mlp)
    fused._modules = dict(mlp._modules, act=FusedGELU())
    fused.__class__ = FusedMLP
    return fused


def test_fused_activation_keeps_one_matrix() -> None:
    kept: list[torch.Size] = []
    x = torch.randn(3, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        FusedGELU()(x)
    assert kept == [x.shape]
