"""`cross_entropy_` against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from planlm.kernels import cross_entropy_

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (7, 1000), (4, 16), (0, 5)], ids=str)
def test_agrees_with_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(shape, generator=generator)).to(dtype)
    target = torch.randint(shape[1], shape[:1], generator=generator)
    target[1::3] = -1
    exact = logits.double().requires_grad_()
    want = F.cross_entropy(exact, target, ignore_index=-1, reduction="none")
    (slope,) = torch.autograd.grad(want.sum(), exact)
    gradient, nll = cross_entropy_(logits.clone(), target)
    assert gradient.dtype == dtype and nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), want.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-7)


def test_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 0.0, 0.0], [-1e4, -1e4, -1e4]])
    gradient, nll = cross_entropy_(logits, torch.tensor([1, 1, 2]))
    torch.testing.assert_close(nll, torch.tensor([2e4, 0.6931472, 1.0986123]))
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -1, 0], [0, -0.5, 0.5], [1 / 3, 1 / 3, -2 / 3]]))


def test_nan_spreads_over_its_row_alone() -> None:
    gradient, nll = cross_entropy_(torch.tensor([[0.0, torch.nan], [0.0, 0.0]]), torch.tensor([0, 0]))
    assert gradient[0].isnan().all() and nll[0].isnan() and gradient[1].isfinite().all() and nll[1].isfinite()


def test_a_target_beyond_the_columns_is_refused() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        cross_entropy_(torch.zeros(2, 3), torch.tensor([0, 3]))


def test_targets_need_not_be_contiguous_and_are_one_a_row() -> None:
    logits, target = torch.randn(3, 5), torch.tensor([1, 9, 4, 9, 0, 9])
    want = cross_entropy_(logits.clone(), target[::2].contiguous())
    for found, wanted in zip(cross_entropy_(logits.clone(), target[::2]), want, strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises((ValueError, RuntimeError)):
        cross_entropy_(logits, torch.tensor([1, 2]))
