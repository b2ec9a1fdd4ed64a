"""Chunked linear cross-entropy against torch's, values and gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planlm.model import loss
from planlm.model.loss import divergence, linear_cross_entropy

CHUNK = 64
"""Rows of a chunk of 11 float32 logits each."""


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
