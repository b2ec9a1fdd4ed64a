"""Float32 where rounding adds up or cancels: one likely action, many like values, at the sizes of real use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from planlm.kernels import add_plan, plan_projection


def worst(found: Tensor, truth: Tensor) -> float:
    return float(((found.double() - truth).abs() / truth.abs().clamp(min=1)).max())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("num_actions", [1, 300])
def test_gradient_of_certain_logits_is_nothing(num_actions: int, temperature: float) -> None:
    """Where an action has all the probability its gradient is a difference of equal numbers in the thousands."""
    best = torch.randint(num_actions, (8,))
    logits = torch.full((8, num_actions), -1e4).scatter_(1, best[:, None], 1e4).requires_grad_()
    codebook, weight = torch.randn(num_actions, 256), torch.randn(4096, 256)
    upstream = torch.randn(8, 4096)
    projected = plan_projection(logits, codebook, weight, temperature=temperature).projected
    (grad,) = torch.autograd.grad(projected, logits, upstream)
    assert float(grad.abs().max()) < 1e-5


def test_likely_actions_have_the_gradient_of_float64() -> None:
    logits = torch.randn(16, 300) * 5
    codebook, weight, upstream = torch.randn(300, 128), torch.randn(2048, 128) / 50, torch.randn(16, 2048)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = logits.to(dtype).requires_grad_()
        projected = plan_projection(leaf, codebook.to(dtype), weight.to(dtype)).projected
        found += torch.autograd.grad(projected, leaf, upstream.to(dtype))
    assert worst(*found) < 1e-5


def test_normaliser_of_like_logits() -> None:
    logits = torch.zeros(1, 262144)
    logits[0, 5] = 0.1
    result = plan_projection(logits, torch.ones(262144, 1), torch.ones(1, 1), oracle=torch.tensor([7]))
    truth = logits.double().logsumexp(1)  # action 7's cross-entropy, too
    assert worst(result.log_normalizer, truth) < 1e-6
    assert worst(result.oracle_nll, truth) < 1e-6


def test_gate_s_gradient_of_many_like_segments() -> None:
    num = 20000
    x, gate = torch.zeros(num, 4), torch.ones(4, requires_grad=True)
    plan = torch.full((num, 4), 0.1)
    (grad,) = torch.autograd.grad(add_plan(x, plan, torch.arange(num), gate).sum(), gate)
    assert worst(grad, plan.double().sum(0)) < 1e-5
