"""The C++ operators' sums in float32 where rounding adds up: many like values, at the sizes of real use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from planlm.kernels import add_plan, cpp, plan_projection

pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))


def worst(found: Tensor, truth: Tensor) -> float:
    return float(((found.double() - truth).abs() / truth.abs().clamp(min=1)).max())


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
