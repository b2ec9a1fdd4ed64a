"""Parts of an LM that are Llama's: where others are put, that a CPU does not notice, and what those compute."""

from __future__ import annotations

import copy
import importlib.metadata
import pickle
import sys
from collections.abc import Iterator
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
    "gemma": (0, 2, True),  # its norms multiply by one more than their weights, its MLPs have another activation
    "gpt2": (0, 0, False),
}


def rotation(lm: PreTrainedModel) -> Any:
    return getattr(sys.modules[type(lm).__module__], "apply_rotary_pos_emb", None)


@pytest.fixture(autouse=True)
def only_here() -> Iterator[None]:
    """What other tests have put into transformers' classes and files is taken out, and what these put there too."""

    def take_out() -> None:
        for family in PARTS:
            file = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
            classes = [value for value in vars(file).values() if isinstance(value, type)]
            for owner, name in [*((one, "forward") for one in classes), (file, "apply_rotary_pos_emb")]:
                plain = getattr(vars(owner).get(name), "replaces", None)
                if plain is not None:
                    setattr(owner, name, plain)

    take_out()
    yield
    take_out()


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


def replaced(lm: PreTrainedModel) -> list[str]:
    """Names of the modules whose classes have another forward."""
    return [name for name, module in lm.named_modules() if hasattr(type(module).forward, "replaces")]


@pytest.mark.parametrize("family", PARTS)
def test_where_they_are_put(family: str) -> None:
    """And a CPU computes the same bits as before; copied, deep and shallow, and pickled too."""
    lm = tiny(family)
    rotate, want, names = rotation(lm), step(lm), list(lm.state_dict())
    for _ in range(2):  # the second changes nothing
        llama.replace_parts(lm)
        found = replaced(lm)
        assert len([name for name in found if "norm" in name]) == PARTS[family][0]
        assert len([name for name in found if name.endswith("mlp")]) == PARTS[family][1]
        assert getattr(rotation(lm), "replaces", None) is (rotate if PARTS[family][2] else None)
    for one in (lm, copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        got = step(one)
        assert list(one.state_dict()) == names and got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
    for module in lm.modules():
        shallow = copy.copy(module)
        assert shallow.forward.__self__ is shallow


def test_halves_that_are_rotated_otherwise_are_left_alone() -> None:
    """nanochat's rotation has Llama's source and turns the other way round."""
    config = AutoConfig.for_model("nanochat", **SIZES)
    lm = AutoModelForCausalLM.from_config(config)
    llama.replace_parts(lm)
    assert rotation(lm) is not None and not hasattr(rotation(lm), "replaces")


def liger_s(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """What is installed of it."""

    def answer(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", answer)
    llama._has_liger.cache_clear()


@pytest.mark.parametrize(("version", "words"), [(None, "is not installed"), ("0.5.10", "0.5.10 is older than 0.8")])
def test_without_liger_a_line_says_so_once(
    version: str | None, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it would serve; then the parts compute as they did."""
    lm = tiny("llama")
    want = step(lm)
    llama.replace_parts(lm)
    liger_s(monkeypatch, version)
    step(lm)
    assert not caplog.records
    monkeypatch.setattr(llama, "_is_on_cuda", lambda tensor: True)
    got = step(lm)
    llama._has_liger.cache_clear()
    (line,) = [record.getMessage() for record in caplog.records]
    assert words in line and "pip install planlm[liger]" in line
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # but for torch's norm


@pytest.mark.parametrize("version", ["0.8.0", "0.10.1.dev3", "1.0"])
def test_versions_that_serve(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    liger_s(monkeypatch, version)
    assert llama._has_liger()
    llama._has_liger.cache_clear()


def test_a_second_backward_pass_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger writes gradients over what was saved, unseen by autograd, which here is told."""
    from liger_kernel.ops import LigerSiLUMulFunction

    class Emulated(LigerSiLUMulFunction):
        """The same without Triton."""

        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor, *_: float) -> Tensor:
            ctx.save_for_backward(a, b)
            return torch.nn.functional.silu(a) * b

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            a, b = ctx.saved_tensors
            sigmoid = a.sigmoid()
            of_a = gradient * b * (sigmoid * (1 + a * (1 - sigmoid)))
            of_b = gradient * a * sigmoid
            a.data.copy_(of_a)
            b.data.copy_(of_b)
            return a, b, None, None

    monkeypatch.setattr("liger_kernel.ops.LigerSiLUMulFunction", Emulated)
    llama._gated.cache_clear()
    a, b = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    out = llama._gated().apply(a * 1, b * 1, 1.0, 1.0)
    llama._gated.cache_clear()
    wanted = torch.autograd.grad(torch.nn.functional.silu(a) * b, (a, b), torch.ones_like(a))
    torch.testing.assert_close(torch.autograd.grad(out, (a, b), torch.ones_like(a), retain_graph=True), wanted)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, (a, b), torch.ones_like(a))


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
    monkeypatch.setattr(llama, "_is_on_cuda", lambda tensor: True)
    got = llama._norm(lambda *_: pytest.fail("Llama's own was called"), norm, x)
    assert got.dtype == want.dtype
    tolerance = 1e-5 if of_states == "float32" else 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(got, (x, norm.weight), torch.ones_like(want))
    torch.testing.assert_close(gradients, wanted, rtol=tolerance, atol=tolerance)


def test_it_is_compiled_and_traced_as_transformers_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA too."""
    lm = tiny("llama")
    ids = torch.arange(24).view(2, 12)
    want = lm.model(ids, use_cache=False).last_hidden_state
    llama.replace_parts(lm)
    monkeypatch.setattr(llama, "_is_on_cuda", lambda tensor: True)
    monkeypatch.setattr(llama, "_has_liger", lambda: pytest.fail("it was asked for"))
    torch.compiler.reset()
    compiled = torch.compile(lm.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).last_hidden_state, want)
    traced = torch.jit.trace(lm.model.norm, torch.randn(2, 64, requires_grad=True))
    assert "rms_norm" not in str(traced.graph)


def test_liger_s_own_patch_may_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its MLP has no activation to look at."""
    from liger_kernel.transformers import LigerSwiGLUMLP
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(LigerSwiGLUMLP, "forward", LigerSwiGLUMLP.forward)  # what is put there is taken out
    monkeypatch.setattr(modeling_llama, "LlamaMLP", LigerSwiGLUMLP)
    monkeypatch.setattr("liger_kernel.transformers.swiglu._swiglu_dispatch", lambda a, b: a * b)
    lm = tiny("llama")
    want = step(lm)
    llama.replace_parts(lm)
    got = step(lm)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", [family for family in PARTS if family != "gpt2"])
def test_a_step_on_cuda_is_that_without(family: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    served: list[str] = []
    serves = llama._serves

    def watched(tensor: Tensor) -> bool:
        served.append(sys._getframe(1).f_code.co_name)
        return serves(tensor) or bool(served.pop() and False)

    monkeypatch.setattr(llama, "_serves", watched)
    after = errors()
    norms, mlps, rotates = PARTS[family]
    # The rotation asks for q and k, in two layers.
    expected = {"_norm": norms, "_mlp": 0 if family == "gemma" else mlps, "_rotated": 4 * rotates}
    assert {name: served.count(name) for name in expected} == expected
    for name, error in after.items():
        assert error <= (1e-5 if precision == "fp32" else 1.5 * before[name] + 1e-3), name
