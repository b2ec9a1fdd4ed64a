"""`cross_entropy_` against torch's in float64, on every backend; test_triton.py runs it in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from planlm.kernels import cross_entropy_, use_backend

from .cases import HALVES, relative_error, seeded
from .conftest import BACKENDS, INTERPRETED, ON_TRITON
from .conftest import operators as triton_operators

ONCE = BACKENDS[:1] if ON_TRITON else BACKENDS
"""Forms of the plan operations make no difference."""
pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.parametrize("backend", ONCE, indirect=True)]

DTYPES = [torch.float32, *HALVES] if ON_TRITON else [torch.float32, *HALVES, torch.float64]
"""Triton has no float64."""
SHAPES = [(1, 1), (3, 17), (4, 16), (5, 83), (0, 5), *([] if INTERPRETED else [(7, 1000)])]
"""In the interpreter a program takes 16 columns at a time, in groups of 4 or 8."""


def exact(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and loss in float64, by torch."""
    leaf = logits.double().requires_grad_()
    nll = F.cross_entropy(leaf, target, ignore_index=-1, reduction="none")
    return torch.autograd.grad(nll.sum(), leaf)[0], nll.detach()


def inputs(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random logits, and targets of which a third is not scored."""
    generator = seeded(0)
    logits = (5 * torch.randn(shape, generator=generator)).to(dtype)
    target = torch.randint(shape[1], shape[:1], generator=generator)
    target[1::3] = -1
    return logits, target


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, target = inputs(shape, dtype)
    slope, want = exact(logits, target)
    with use_backend("reference"):
        eager, _ = cross_entropy_(logits.clone(), target)
    gradient, nll = cross_entropy_(logits.clone(), target)
    assert gradient.dtype == dtype and nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), want, rtol=1e-6, atol=2e-6)
    if dtype in HALVES:
        assert relative_error(gradient, slope) <= relative_error(eager, slope) + 1e-3
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 4e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6])
def test_what_logits_have_in_common_costs_nothing(offset: float) -> None:
    logits, target = inputs((3, 83))
    logits += offset
    slope, want = exact(logits, target)  # of the rounded sums
    gradient, nll = cross_entropy_(logits.clone(), target)
    torch.testing.assert_close(nll.double(), want, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=4e-6, atol=1e-7)


def check_same(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """To the last bit; on a GPU up to a rounding: where rows begin decides which of a row's entries a thread sums."""
    for got, wanted in zip(found, want, strict=True):
        if got.is_cuda:
            rounding = torch.finfo(got.dtype).eps  # of the sum of exponentials, 16 nats large
            torch.testing.assert_close(got, wanted, rtol=max(5e-6, rounding), atol=0.0)
        else:
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["wide rows", "misaligned", "columns apart", "overlapping"])
def test_any_strides(case: str, dtype: torch.dtype) -> None:
    logits, target = inputs((5, 83), dtype)
    wide = torch.full((5, 96), 7.0, dtype=dtype)
    given = {
        "wide rows": wide[:, :83],
        "misaligned": torch.empty(5 * 89 + 1, dtype=dtype)[1:].view(5, 89)[:, :83],
        "columns apart": torch.empty(83, 5, dtype=dtype).t(),
        "overlapping": None,
    }[case]
    if given is None:
        given = logits[:1].clone().expand(5, -1)
        logits = given.contiguous()
    else:
        given.copy_(logits)
    found, want = cross_entropy_(given, target), cross_entropy_(logits.clone(), target)
    check_same(found, want)
    assert bool((wide[:, 83:] == 7.0).all())  # nothing beyond the columns is written


def test_rows_that_lie_beyond_what_32_bits_count() -> None:
    far, dtype = 2**30, torch.bfloat16
    apart = torch.empty(0, dtype=dtype)
    memory = torch.UntypedStorage(dtype.itemsize * (2 * far + 37), device=apart.device)  # three pages of it are touched
    apart.set_(memory, 0, (3, 37), (far, 1))
    logits, target = inputs((3, 37), dtype)
    target[:] = torch.tensor([36, -1, 5])
    check_same(cross_entropy_(apart.copy_(logits), target), cross_entropy_(logits, target))


def test_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 0.0, 0.0], [-1e4, -1e4, -1e4], [-torch.inf, 0.0, 1.0]])
    gradient, nll = cross_entropy_(logits, torch.tensor([1, 1, 2, 0]))
    torch.testing.assert_close(nll, torch.tensor([2e4, 0.6931472, 1.0986123, torch.inf]))
    want = [[1.0, -1, 0], [0, -0.5, 0.5], [1 / 3, 1 / 3, -2 / 3], [-1, 0.2689414, 0.7310586]]
    torch.testing.assert_close(gradient, torch.tensor(want))


@pytest.mark.parametrize("place", [0, 20, 36])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_spreads_over_its_row_alone(value: float, place: int) -> None:
    logits = torch.zeros(4, 37)
    logits[0, place] = value
    logits[1] = -torch.inf
    logits[2, place] = value
    gradient, nll = cross_entropy_(logits, torch.tensor([0, 0, -1, 0]))
    assert gradient[:2].isnan().all() and nll[:2].isnan().all()
    assert not gradient[2].any() and nll[2] == 0  # not scored
    assert gradient[3].isfinite().all() and nll[3].isfinite()


def test_no_target_is_zero() -> None:
    gradient, nll = cross_entropy_(torch.randn(3, 40), torch.full((3,), -100))
    assert not gradient.any() and not nll.any()


def test_a_target_beyond_the_columns_is_refused(backend: str) -> None:
    if backend == "triton":  # a device that does not look: NaN instead of memory that is not the row's
        gradient, nll = cross_entropy_(torch.zeros(2, 3), torch.tensor([0, 3]))
        assert gradient[1].isnan().all() and nll[1].isnan() and gradient[0].isfinite().all() and nll[0].isfinite()
    else:
        with pytest.raises((IndexError, RuntimeError)):
            cross_entropy_(torch.zeros(2, 3), torch.tensor([0, 3]))


def test_targets_need_not_be_contiguous_and_are_one_a_row() -> None:
    logits, target = torch.randn(3, 5), torch.tensor([1, 9, 4, 9, 0, 9])
    want = cross_entropy_(logits.clone(), target[::2].contiguous())
    for found, wanted in zip(cross_entropy_(logits.clone(), target[::2]), want, strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises((ValueError, RuntimeError)):
        cross_entropy_(logits, torch.tensor([1, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_repeated_and_in_place(backend: str, dtype: torch.dtype) -> None:
    logits, target = inputs((5, 83), dtype)
    want = cross_entropy_(logits.clone(), target)
    again = logits.clone()
    compiled = torch.compile(cross_entropy_, fullgraph=True, backend="aot_eager")
    for found in (cross_entropy_(again, target), compiled(logits.clone(), target)):
        for got, wanted in zip(found, want, strict=True):
            assert torch.equal(got, wanted)
    assert backend == "reference" or torch.equal(again, want[0])


def test_opcheck(backend: str) -> None:
    logits, target = inputs((5, 83))
    cross_entropy_(logits.clone(), target)
    if backend == "reference":
        return
    operators = triton_operators() if backend == "triton" else torch.ops.planlm
    torch.library.opcheck(operators.cross_entropy_.default, (logits, target))
