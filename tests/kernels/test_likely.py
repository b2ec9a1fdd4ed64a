"""Gradients where one action has nearly all of the probability: differences of numbers in the thousands."""

from __future__ import annotations

import pytest
import torch

from planlm.kernels import plan_projection, plan_projection_from_hidden, use_backend

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("num_actions", [1, 300])
def test_gradient_of_certain_logits_is_nothing(num_actions: int, temperature: float) -> None:
    best = torch.randint(num_actions, (4,))
    logits = torch.full((4, num_actions), -1e4).scatter_(1, best[:, None], 1e4).requires_grad_()
    codebook, weight = torch.randn(num_actions, 256), torch.randn(3000, 256)
    upstream = torch.randn(4, 3000)
    projected = plan_projection(logits, codebook, weight, temperature=temperature).projected
    (grad,) = torch.autograd.grad(projected, logits, upstream)
    assert float(grad.abs().max()) < 1e-5


def test_likely_actions_have_the_gradient_of_float64() -> None:
    logits = torch.randn(12, 200) * 5
    codebook, weight, upstream = torch.randn(200, 96), torch.randn(1000, 96) / 40, torch.randn(12, 1000)

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        leaf = logits.to(dtype).requires_grad_()
        projected = plan_projection(leaf, codebook.to(dtype), weight.to(dtype)).projected
        return torch.autograd.grad(projected, leaf, upstream.to(dtype))[0].double()

    with use_backend("reference"):
        truth = gradient(torch.float64)
    assert float(((gradient(torch.float32) - truth).abs() / truth.abs().clamp(min=1)).max()) < 1e-5


@pytest.mark.parametrize("oracle_weight", [0.0, 0.4])
def test_certain_actions_pass_nothing_to_the_planner(oracle_weight: float) -> None:
    """The same from hidden states; the oracle has a weight, noise has its part."""
    drawn = [torch.randn(6, 32, device="cpu"), torch.randn(90, 32, device="cpu") * 3000]  # the same on every device
    hidden, head = (tensor.to(torch.get_default_device()) for tensor in drawn)
    codebook, weight = torch.randn(90, 64), torch.randn(1024, 64)
    oracle, noise, upstream = torch.arange(6), torch.randn(6, 90), torch.randn(6, 1024)
    leaves = [hidden.requires_grad_(), head.requires_grad_(), noise.requires_grad_()]
    projected = plan_projection_from_hidden(
        hidden,
        head,
        None,
        codebook,
        weight,
        noise=noise,
        selection="gumbel",
        oracle=oracle,
        oracle_weight=oracle_weight,
    ).projected
    scores = (hidden.double() @ head.double().T + noise).topk(2).values
    assert float((scores[:, 0] - scores[:, 1]).detach().min()) > 200, "one action has all the probability"
    for gradient in torch.autograd.grad(projected, leaves, upstream):
        assert float(gradient.abs().max()) < 1e-5
