"""`attention_window`: each layer attends to the last N tokens, whichever way attention is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from planlm import speedups
from planlm.errors import InputError
from planlm.kernels import has_packed_attention
from planlm.model import PlanLMForCausalLM
from planlm.model.attention import take_plans
from planlm.model.families import set_dropout

from .conftest import FAMILIES, TEXTS, joint, logits, tokens

WIDTH = 20
NEEDS_BF16 = pytest.mark.skipif(
    not has_packed_attention(torch.device("cpu"), torch.bfloat16), reason="no bf16 products here"
)


def make_lm(family: str, window: int | None, layers: int = 1) -> PreTrainedModel:
    """A tiny random LM of which each layer sees `window` tokens; Mistral's own window is 6."""
    torch.manual_seed(0)
    if family == "gpt2":
        lm: PreTrainedModel = GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_embd=32, n_layer=layers, n_head=2, n_positions=64, initializer_range=0.2)
        )
    else:
        shape: dict[str, Any] = {
            "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers,
            "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2,
        }  # fmt: skip
        is_mistral = family == "mistral"
        lm = (
            MistralForCausalLM(MistralConfig(sliding_window=6, **shape))
            if is_mistral
            else LlamaForCausalLM(LlamaConfig(**shape))
        )
    take_plans(lm, window)
    return lm.eval()


@torch.no_grad()
def expected(lm: PreTrainedModel, ids: Tensor, window: int) -> Tensor:
    """Logits of a one-layer LM that sees nothing but the window of each position: exact by construction."""
    found = []
    for last in range(ids.shape[1]):
        first = max(0, last - window + 1)
        at = torch.arange(first, last + 1)[None]
        found.append(lm(ids[:, first : last + 1], position_ids=at, use_cache=False).logits[:, -1])
    return torch.stack(found, dim=1)


def pieces(lm: PreTrainedModel, ids: Tensor, sizes: tuple[int, ...], cache: Any = None) -> Tensor:
    found = []
    for part in ids.split(sizes, dim=1):
        output = lm(part, past_key_values=cache, use_cache=True)
        found.append(output.logits)
        cache = output.past_key_values
    return torch.cat(found, dim=1)


@torch.no_grad()
def by(way: str, lm: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of the whole text, computed in one of the ways that an LM is called."""
    width = ids.shape[1]
    if way == "eager":
        lm.set_attn_implementation("eager")
    if way in ("plain", "eager"):
        return lm(ids, use_cache=False).logits
    if way == "left padding":
        padded, at = torch.nn.functional.pad(ids, (3, 0)), torch.arange(-3, width).clamp_min(0)[None]
        mask = (torch.arange(-3, width) >= 0).expand(len(ids), -1).long()
        return lm(padded, attention_mask=mask, position_ids=at, use_cache=False).logits[:, 3:]
    if way == "packed":
        at = torch.cat((torch.arange(9), torch.arange(width)))[None]
        return lm(torch.cat((ids[:, :9], ids), dim=1), position_ids=at, use_cache=False).logits[:, 9:]
    if way == "bias":  # what is added to the scores, with other numbers than 0 where a token is seen
        at = torch.arange(width)
        bias = torch.full((width, width), -1e4).triu(1) - 1e-6 * (at[:, None] - at).abs()
        return lm(ids, attention_mask=bias[None, None], use_cache=False).logits
    if way == "static cache":
        cache = StaticCache(config=lm.config, max_cache_len=32)
        return pieces(lm, ids, (7, 1, 1, width - 9), cache)
    return pieces(lm, ids, (7, *[1] * (width - 11), 4))


WAYS = ("plain", "eager", "left padding", "packed", "bias", "cache", "static cache")


@pytest.mark.parametrize(
    ("family", "way"),
    [(family, way) for family in ("gpt2", "llama", "mistral") for way in WAYS if (family, way) != ("mistral", "bias")],
)  # a mask that is given replaces Mistral's own window
@pytest.mark.parametrize("window", [1, 5, 8])
def test_a_layer_sees_its_window_exactly(family: str, way: str, window: int) -> None:
    """Against an LM that is shown nothing else; the smaller of two windows wins."""
    ids = torch.randint(50, (2, WIDTH))
    narrow = min(window, 6) if family == "mistral" else window
    want = expected(make_lm(family, None), ids, narrow)
    torch.testing.assert_close(by(way, make_lm(family, window), ids), want, rtol=1e-4, atol=1e-4)
    if way == "plain" and window > 1:
        assert not torch.allclose(expected(make_lm(family, None), ids, narrow - 1)[:, -1], want[:, -1], atol=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_layers_see_their_windows_one_behind_the_other(family: str) -> None:
    """L layers of N tokens see L (N - 1) + 1, of the plan's way no word: to the last bit nothing before that counts."""
    window, layers = 4, 3
    lm, ids = make_lm(family, window, layers), torch.randint(50, (1, WIDTH))
    reach = layers * (window - 1) + 1
    with torch.no_grad():
        before = lm(ids).logits[0, -1]
        for distance, is_seen in ((reach - 1, True), (reach, False), (reach + 1, False)):
            changed = ids.clone()
            changed[0, -1 - distance] += 1
            assert torch.equal(lm(changed % 50).logits[0, -1], before) is not is_seen, distance


@pytest.mark.parametrize("window", [None, WIDTH, 100])
def test_a_window_as_long_as_the_text_changes_no_bit(window: int | None) -> None:
    ids = torch.randint(50, (2, WIDTH))
    with torch.no_grad():
        assert torch.equal(make_lm("gpt2", window)(ids).logits, make_lm("gpt2", None)(ids).logits)


@NEEDS_BF16
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_kernel_for_packed_documents_serves(is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients in bf16 are those of a mask."""
    joints = {}
    ids, window = torch.randint(50, (2, WIDTH)), 5
    at = torch.cat((torch.arange(8), torch.arange(12))).expand(2, -1) if is_packed else None
    calls = []
    function = speedups.lm.kernels.packed_attention
    monkeypatch.setattr(speedups.lm.kernels, "packed_attention", lambda *given: calls.append(1) or function(*given))
    for pieces_on in (set(), set(speedups.PIECES)):
        monkeypatch.setattr(speedups, "ON", pieces_on)
        lm = make_lm("llama", window, 2)
        with torch.autocast("cpu", torch.bfloat16):
            starts = None if at is None else speedups.lm.document_starts(lm, at)
            out = lm(ids, attention_mask=starts, position_ids=at, use_cache=False).logits
        out.float().square().mean().backward()
        joints[bool(pieces_on)] = (out.detach(), [parameter.grad for parameter in lm.parameters()])
        assert bool(calls) is bool(pieces_on)
    for fast, slow in zip((joints[True][0], *joints[True][1]), (joints[False][0], *joints[False][1]), strict=True):
        assert (fast - slow).norm() < 0.03 * slow.norm()


def test_flash_attention_gets_the_smaller_window(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def flash(module: Any, query: Tensor, *_: Any, sliding_window: int | None = None, **__: Any) -> Any:
        given.append(sliding_window)
        return torch.zeros_like(query).transpose(1, 2), None

    for family, window in (("gpt2", 4), ("mistral", 4), ("mistral", 8), ("gpt2", None)):
        lm = make_lm(family, window)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_of_a_test", flash)
        lm.config._attn_implementation = "flash_of_a_test"
        lm(torch.randint(50, (1, WIDTH)), use_cache=False)
    assert given == [4, 4, 6, None]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"num_beams": 2}])
def test_generation_agrees_with_and_without_cache(
    family: str, sampling: dict[str, Any], lm_folder: Callable[[str], str], encoder: object
) -> None:
    model = joint(lm_folder(family), encoder, attention_window=6)
    ids = tokens(model, TEXTS[0])
    padded = torch.nn.functional.pad(ids, (4, 0))
    mask = (torch.arange(padded.shape[1]) >= 4).long()[None]
    settings = {"max_new_tokens": 16, "eos_token_id": -1, **sampling}
    cached, uncached = (
        model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use, **settings) for use in (True, False)
    )
    assert cached.tolist() == uncached.tolist()
    assert model.generate(padded, attention_mask=mask, **settings)[0, 4:].tolist() == cached[0].tolist()


def test_the_planner_reads_beyond_the_window(lm_folder: Callable[[str], str], encoder: object, tmp_path: Any) -> None:
    """The plan is the LM's long-range route; a saved model keeps its window."""
    model = joint(lm_folder("gpt2"), encoder, attention_window=2)
    model.save_pretrained(tmp_path)
    loaded = PlanLMForCausalLM.from_pretrained(tmp_path).eval()
    loaded.encoder = encoder  # type: ignore[assignment]
    assert loaded.config.attention_window == 2
    first, second = (tokens(model, TEXTS[0].replace("mat", word)) for word in ("mat", "mill"))
    second = second[:, : first.shape[1]]
    assert first.shape == second.shape
    assert torch.equal(logits(loaded, first), logits(model, first))
    assert torch.equal(logits(model, first, selection="none")[:, -1], logits(model, second, selection="none")[:, -1])
    assert not torch.equal(logits(model, first)[:, -1], logits(model, second)[:, -1])


def test_layers_computed_again_see_the_same(lm_folder: Callable[[str], str], encoder: object) -> None:
    """Activation checkpointing leaves values and gradients as they are, with LoRA in the LM too."""
    for lora in (None, (2, 4.0)):
        found = []
        for again in (False, True):
            model = joint(lm_folder("gpt2"), encoder, attention_window=3, lora=lora).train()
            set_dropout(model.lm, 0.0)
            if again:
                model.lm.activation_checkpointing_enable({"use_reentrant": False})
            ids = tokens(model)
            output = model(ids, labels=ids, use_cache=False)
            output.loss.backward()
            found.append((output.loss.detach(), model.adapter.weight.grad))
        torch.testing.assert_close(found[1], found[0])


def test_other_implementations_are_refused() -> None:
    lm = make_lm("gpt2", 4)
    lm.config._attn_implementation = "flex_attention"
    with pytest.raises(InputError, match="attention_window: not with the attention 'flex_attention'"):
        lm(torch.randint(50, (1, WIDTH)), use_cache=False)
