"""Parts of an LM that are Llama's: where others are put, that a CPU does not notice, and what those compute."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from planlm.speedups import llama

pytest.importorskip("liger_kernel")

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

PARTS = {  # norms, MLPs, and whether the rotation is
    "llama": (5, 2, True),
    "mistral": (5, 2, True),
    "qwen2": (5, 2, True),
    "qwen3": (9, 2, True),  # norms of queries and keys too
    "smollm3": (5, 2, True),
    "olmo": (0, 2, True),
    "gemma": (0, 0, True),  # its norms multiply by one more than their weights, its activation is another
    "gpt2": (0, 0, False),
}


def file_of(lm: PreTrainedModel) -> ModuleType:
    return sys.modules[type(lm).__module__]


def rotation(lm: PreTrainedModel) -> Any:
    return getattr(file_of(lm), "apply_rotary_pos_emb", None)


@pytest.fixture
def rotations_stay() -> Iterator[None]:
    """What a test has put into transformers' files is taken out again."""
    names = [f"transformers.models.{family}.modeling_{family}" for family in PARTS]
    before = {name: getattr(sys.modules.get(name), "apply_rotary_pos_emb", None) for name in names}
    yield
    for name, rotate in before.items():
        if rotate is not None:
            sys.modules[name].apply_rotary_pos_emb = rotate  # type: ignore[attr-defined]


def tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "bos_token_id")}
    config = AutoConfig.for_model(family, **(sizes if family == "gpt2" else SIZES))
    lm: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return lm.eval()


def step(lm: PreTrainedModel) -> dict[str, Tensor]:
    """Logits and all gradients of a training step."""
    ids = torch.arange(24, device=lm.device).view(2, 12) * 7 % 300
    positions = torch.tensor([[*range(7), *range(5)], [*range(12)]], device=lm.device)
    logits = lm(ids, position_ids=positions, use_cache=False).logits
    lm.zero_grad()
    logits.float().logsumexp(-1).square().sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in lm.named_parameters() if weight.grad is not None}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize("family", PARTS)
def test_where_they_are_put(family: str, rotations_stay: None) -> None:
    """And a CPU computes the same bits as before, after a copy too."""
    lm = tiny(family)
    rotate, want, names = rotation(lm), step(lm), list(lm.state_dict())
    for time in range(2):  # the second changes nothing
        first = rotation(lm)
        llama.replace_parts(lm)
        assert time == 0 or rotation(lm) is first
        placed = [vars(module).get("forward") for module in lm.modules()]
        functions = [forward.__func__ for forward in placed if forward is not None]
        assert (functions.count(llama._norm), functions.count(llama._mlp)) == PARTS[family][:2]
        assert (rotation(lm) is not rotate) is PARTS[family][2]
    twin = copy.deepcopy(lm)
    assert all(vars(module)["forward"].__self__ is module for module in twin.modules() if "forward" in vars(module))
    for one in (lm, twin):
        got = step(one)
        assert list(one.state_dict()) == names and got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_without_liger_a_line_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rotations_stay: None
) -> None:
    """Where it would serve; then the parts compute as they did."""
    lm = tiny("llama")
    want = step(lm)
    llama.replace_parts(lm)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    llama._has_liger.cache_clear()
    step(lm)
    assert not caplog.records
    monkeypatch.setattr(llama, "_serves", lambda tensor: tensor.requires_grad)
    got = step(lm)
    llama._has_liger.cache_clear()
    assert [record.getMessage() for record in caplog.records if "pip install planlm[liger]" in record.getMessage()]
    assert len(caplog.records) == 1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # but for torch's norm


@pytest.mark.parametrize(
    ("of_states", "of_weights"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
)
def test_torch_s_norm_is_llama_s(of_states: str, of_weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, gradients and dtypes, as CUDA takes it; of bf16 it rounds once instead of twice."""
    norm = tiny("llama").model.norm.to(getattr(torch, of_weights))
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 64, dtype=getattr(torch, of_states), requires_grad=True)
    want = norm(x)
    wanted = torch.autograd.grad(want, (x, norm.weight), torch.ones_like(want))
    monkeypatch.setattr(llama, "_serves", lambda tensor: True)
    got = llama._norm(norm, x)
    tolerance = 1e-5 if of_states == "float32" else 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(got, (x, norm.weight), torch.ones_like(want))
    torch.testing.assert_close(gradients, wanted, rtol=tolerance, atol=tolerance)


def test_it_is_compiled_in_one_piece(rotations_stay: None) -> None:
    lm = tiny("llama")
    ids = torch.arange(24).view(2, 12)
    want = lm.model(ids, use_cache=False).last_hidden_state
    llama.replace_parts(lm)
    torch.compiler.reset()
    compiled = torch.compile(lm.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).last_hidden_state, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", [family for family in PARTS if family != "gpt2"])
def test_a_step_on_cuda_is_that_without(family: str, precision: str, rotations_stay: None) -> None:
    """Logits and gradients against float64: in float32 to 1e-5, in bf16 no further away than without by a half."""
    lm = tiny(family)
    want = step(copy.deepcopy(lm).double())
    lm = lm.cuda()

    def errors() -> dict[str, float]:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            got = step(lm)
        return {name: float((got[name].cpu().double() - want[name]).norm() / want[name].norm()) for name in want}

    before = errors()
    llama.replace_parts(lm)
    called: list[Any] = []
    serves = llama._serves
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "_serves", lambda tensor: called.append(tensor) or serves(tensor))
        after = errors()
    assert any(map(serves, called))
    for name, error in after.items():
        assert error <= (1e-5 if precision == "fp32" else 1.5 * before[name] + 1e-3), name
