"""Chunked linear cross-entropy against torch's, values and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from planlm.kernels import use_backend
from planlm.model import loss
from planlm.model.loss import divergence, linear_cross_entropy

CHUNK = 64
"""Rows of a chunk of 11 float32 logits each."""

ADDMM = torch.addmm


def addmm(
    total: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype | None = None, **options: Any
) -> Tensor:
    """torch.addmm with a dtype for the result, which the CPU lacks: sums as cuBLAS's, of operands in half precision."""
    if out_dtype is None:
        return ADDMM(total, left, right, **options)
    assert left.dtype == right.dtype and total.dtype == out_dtype and options["out"] is total
    return ADDMM(total, left.to(out_dtype), right.to(out_dtype), **options)


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and products of the GPU's path, 64 tokens and 16 words at a time."""
    monkeypatch.setattr(loss, "_on_gpu", lambda hidden: True)
    monkeypatch.setattr(loss, "TOKENS", CHUNK)
    monkeypatch.setattr(loss, "MULTIPLE", 8)
    monkeypatch.setattr(loss, "ALIGNED", 16)
    monkeypatch.setattr(torch, "addmm", addmm)


@pytest.fixture(params=["cpu", "gpu"])
def _path(request: pytest.FixtureRequest) -> None:
    """The CPU's path, and the GPU's."""
    if request.param == "gpu":
        request.getfixturevalue("_as_on_a_gpu")


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("num_rows", [1, CHUNK, 2 * CHUNK + 37])
@pytest.mark.parametrize("with_bias", [False, True])
def test_agrees_with_the_unchunked_loss(num_rows: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", CHUNK * 11 * 4)
    monkeypatch.setattr(loss, "WORDS", 4)
    hidden = torch.randn(num_rows, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    bias = torch.randn(11, requires_grad=True) if with_bias else None
    labels = torch.randint(0, 11, (num_rows,))
    labels[num_rows // 3 : num_rows // 2] = -100
    nll_sum, token_nll = linear_cross_entropy(hidden, weight, labels, bias)
    (0.37 * nll_sum).backward()
    got = [part.grad for part in (hidden, weight, bias) if part is not None]
    for part in (hidden, weight, bias):
        if part is not None:
            part.grad = None
    expected = F.cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index=-100, reduction="none")
    (0.37 * expected.sum()).backward()
    torch.testing.assert_close(token_nll, expected)
    torch.testing.assert_close(nll_sum, expected.sum())
    for mine, part in zip(got, [p for p in (hidden, weight, bias) if p is not None], strict=True):
        torch.testing.assert_close(mine, part.grad)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("num_rows", [1, 2 * CHUNK + 37])
@pytest.mark.parametrize("has_own_head", [False, True])
def test_divergence_agrees_with_the_unchunked_one(
    num_rows: int, has_own_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK", CHUNK * 11 * 4)
    monkeypatch.setattr(loss, "ROWS", 24)
    head, base_head = nn.Linear(8, 11), nn.Linear(6, 11) if has_own_head else None
    hidden, base_hidden = torch.randn(num_rows, 8, requires_grad=True), torch.randn(num_rows, 6 if has_own_head else 8)
    labels = torch.randint(0, 11, (num_rows,))
    labels[num_rows // 3 : num_rows // 2] = -100
    parts = [hidden, head.weight, head.bias]
    kl_sum = divergence(hidden, head, (base_hidden, base_head), labels)
    got = torch.autograd.grad(0.37 * kl_sum, parts)
    log_q = head(hidden).log_softmax(-1)
    log_p = (base_head or head)(base_hidden).log_softmax(-1).detach()
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)[labels >= 0].sum()
    torch.testing.assert_close(kl_sum, expected)
    for mine, wanted in zip(got, torch.autograd.grad(0.37 * expected, parts), strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_on_a_gpu_partial_gradients_of_the_weight_are_not_rounded() -> None:
    """40 chunks of bf16: as exact as float32 sums of the same products."""
    hidden, weight = 1 + torch.randn(40 * CHUNK, 8).bfloat16(), torch.randn(11, 8, requires_grad=True)
    labels, slopes = torch.randint(11, (len(hidden),)), []

    def chunk_loss(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        slopes.append(loss.cross_entropy_(logits, labels[chunk])[0].double())
        return logits, torch.zeros(len(logits))

    loss._LinearLoss.apply(hidden, weight, None, chunk_loss)[0].backward()
    assert len(slopes) == 40
    want = torch.cat(slopes).T @ hidden.double()
    assert ((weight.grad - want).norm() / want.norm()).item() < 1e-6


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("weight_learns", [True, False])
def test_on_a_gpu_only_what_learns_is_computed(weight_learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    monkeypatch.setattr(torch, "addmm", lambda *parts, **options: sums.append(parts[0]) or addmm(*parts, **options))
    hidden, weight = torch.randn(2 * CHUNK, 8, requires_grad=True), torch.randn(11, 8, requires_grad=weight_learns)
    linear_cross_entropy(hidden, weight, torch.randint(11, (len(hidden),)))[0].backward()
    assert len(sums) == 2 * weight_learns and (weight.grad is not None) == weight_learns


class Products(TorchDispatchMode):
    """Counts matrix products."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.number += function._schema.name in ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul")
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_a_backward_pass_no_gradient_is_formed(without: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parameters that learn either: evaluation has them."""
    monkeypatch.setattr(loss, "CHUNK", CHUNK * 11 * 4)
    hidden, labels = torch.randn(3 * CHUNK, 8), torch.randint(11, (3 * CHUNK,))
    head, base = nn.Linear(8, 11), nn.Linear(8, 11)
    want = linear_cross_entropy(hidden, head.weight, labels, head.bias)[1]
    with without(), Products() as products:
        got = linear_cross_entropy(hidden, head.weight, labels, head.bias)[1]
    assert torch.equal(got, want) and products.number == 3
    with without(), Products() as products:
        divergence(hidden, head, (hidden, base), labels)
    assert products.number == 6


class LargeResults(TorchDispatchMode):
    """Collects the names of the operators that write a matrix of at least so many rows and columns."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns, self.names = rows, columns, []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_large = isinstance(result, Tensor) and result.ndim == 2
        if is_large and result.shape[0] >= self.rows and result.shape[1] >= self.columns and not function.is_view:
            self.names.append(function._schema.name)
        return result


def test_on_a_gpu_logits_exist_once_and_nothing_waits() -> None:
    """On tensors without data: a wait for a value would raise."""
    pytest.importorskip("triton")
    from planlm.kernels.triton_launch import observed

    num_tokens, num_words = 2 * loss.TOKENS + 8, 50257
    hidden = torch.empty(num_tokens, 24, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(num_words, 24, device="meta", requires_grad=True)
    labels = torch.empty(num_tokens, device="meta", dtype=torch.int64)
    launches: list[Any] = []
    counter = LargeResults(1024, num_words)
    with use_backend("triton"), observed(lambda launch: bool(launches.append(launch)), 90), counter:
        nll_sum, token_nll = linear_cross_entropy(hidden, weight, labels)
    nll_sum.backward()
    assert counter.names == ["aten::new_empty", *["aten::mm"] * 3]
    assert nll_sum.dtype == token_nll.dtype == torch.float32 and token_nll.shape == (num_tokens,)
    assert hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape
    chunks = [launch.writes[0] for launch in launches]
    assert [len(logits) for logits in chunks] == [2816, 2816, 2568]
    assert all(logits.dtype == torch.bfloat16 and logits.stride() == (50304, 1) for logits in chunks)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with use_backend("triton"):
        assert compiled(hidden, weight, labels)[1].shape == (num_tokens,)


LIGER = """
import torch
import torch.nn.functional as F
from planlm.model.loss import LOSSES
torch.manual_seed(0)
for dtype, allowance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-3)):
    for bias in (None, torch.randn(300, requires_grad=True)):
        hidden, weight = torch.randn(70, 64, dtype=dtype, requires_grad=True), torch.randn(300, 64, requires_grad=True)
        labels = torch.randint(300, (70,))
        labels[5:9] = -100
        inputs = [part for part in (hidden, weight, bias) if part is not None]
        exact = F.cross_entropy(F.linear(*(part.double() for part in inputs)), labels, reduction="sum")
        found = [LOSSES[name](hidden, weight, labels, bias)[0].double() for name in ("chunked", "liger")]
        losses = [exact, *found]
        gradients = zip(*(torch.autograd.grad(0.37 * loss, inputs) for loss in losses), strict=True)
        for part, (want, own, gradient) in zip(inputs, gradients, strict=True):
            assert gradient.dtype == part.dtype
            errors = [((each - want).float().norm() / want.float().norm()).item() for each in (own, gradient)]
            assert errors[1] < 2 * errors[0] + allowance, (dtype, errors)
        assert abs(found[1] - exact) < 2 * abs(found[0] - exact) + allowance * exact
"""


def test_liger_agrees_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", LIGER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_all_ignored_is_zero_with_zero_gradient() -> None:
    hidden = torch.randn(5, 8, requires_grad=True)
    nll_sum, token_nll = linear_cross_entropy(hidden, torch.randn(11, 8), torch.full((5,), -100))
    nll_sum.backward()
    assert nll_sum.item() == 0 and not token_nll.any() and not hidden.grad.any()


def test_runs_in_bf16_under_autocast_and_keeps_gradient_dtypes() -> None:
    hidden = torch.randn(64, 32, requires_grad=True)
    weight = torch.randn(101, 32, requires_grad=True)
    labels = torch.randint(0, 101, (64,))
    exact, _ = linear_cross_entropy(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, token_nll = linear_cross_entropy(hidden, weight, labels)
    rounded.backward()
    assert token_nll.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert abs(rounded.item() / exact.item() - 1) < 0.01
    assert rounded.item() != exact.item()


def test_a_second_backward_pass_is_refused() -> None:
    """Its gradients were scaled in place: a second pass would scale them again."""
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss, _ = linear_cross_entropy(hidden, weight, torch.randint(7, (5,)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()
