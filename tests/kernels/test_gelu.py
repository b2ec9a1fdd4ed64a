"""`gelu` against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from planlm.kernels import cpp, gelu

pytestmark = pytest.mark.usefixtures("backend")

TAIL = {"cpp": 1e-6, "reference": 5e-6}
"""Absolute error far from zero: torch adds 1 and a tanh near -1."""


def exact(x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.double().requires_grad_()
    out = F.gelu(x, approximate="tanh")
    (slope,) = torch.autograd.grad(out, x, grad.double())
    return out.detach(), slope


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 17), (2, 5, 4099)], ids=str)
def test_agrees_with_torch(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    x, grad = (4 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    want, want_slope = exact(x, grad)
    x.requires_grad_()
    out = gelu(x)
    (slope,) = torch.autograd.grad(out, x, grad)
    assert out.dtype == slope.dtype == dtype
    tolerance = {"rtol": 4e-3 if dtype == torch.bfloat16 else 2e-6, "atol": TAIL[backend]}
    torch.testing.assert_close(out.double(), want, **tolerance)
    torch.testing.assert_close(slope.double(), want_slope, **tolerance)


def test_extreme_values() -> None:
    x = torch.tensor([1e4, -1e4, 60.0, -60.0, 0.0, -0.0, 1e-30, torch.inf, torch.nan], requires_grad=True)
    out = gelu(x)
    (slope,) = torch.autograd.grad(out[:7].sum(), x)
    torch.testing.assert_close(out[:7].detach(), torch.tensor([1e4, 0, 60, 0, 0, 0, 5e-31]), atol=0, rtol=1e-6)
    torch.testing.assert_close(slope[:7], torch.tensor([1.0, 0, 1, 0, 0.5, 0.5, 0.5]), atol=0, rtol=1e-6)
    assert out[7] == torch.inf and out[8].isnan()


def test_gradients_that_are_views_or_expanded() -> None:
    x = torch.randn(6, 40, requires_grad=True)
    (slope,) = torch.autograd.grad(gelu(x), x, torch.ones(1).expand(6, 40))
    torch.testing.assert_close(slope, exact(x.detach(), torch.ones(6, 40))[1].float())
    y = torch.randn(40, 6).t().requires_grad_()
    torch.testing.assert_close(gelu(y), F.gelu(y, approximate="tanh"))


def test_it_repeats_to_the_bit_and_compiles() -> None:
    x = torch.randn(33, 65, requires_grad=True)
    assert torch.equal(gelu(x), gelu(x))
    if cpp.why_not() is None:  # else the operator has shapes and no implementation
        torch.library.opcheck(torch.ops.planlm.gelu.default, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_far_from_zero_it_is_a_ramp(dtype: torch.dtype, backend: str) -> None:
    if backend == "reference":
        pytest.skip("torch's own")
    x = torch.tensor([-1e18, -1e14, -1e7, 1e7, 1e14, 1e18], dtype=dtype, requires_grad=True)
    out = gelu(x)
    (slope,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(slope, (x > 0).to(dtype)) and torch.equal(out, x.clamp(min=0))
