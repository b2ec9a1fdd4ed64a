"""Every C++ operator under every mode of torch and with several threads, which know nothing of their caller's modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from planlm.kernels import (
    add_plan,
    cpp,
    cross_entropy_,
    environment,
    packed_attention,
    plan_projection,
    plan_projection_from_hidden,
    use_backend,
)

from .cases import gradients, hidden_inputs, leaves, projection_inputs, projection_options

pytestmark = [
    pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not())),
    pytest.mark.skipif(environment.interpreted(), reason="the C++ operators have no interpreter"),
]


@contextmanager
def both(outer: AbstractContextManager[object], inner: AbstractContextManager[object]) -> Iterator[None]:
    with outer, inner:
        yield


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast, inference": lambda: both(torch.autocast("cpu", torch.bfloat16), torch.inference_mode()),
}
# Actions enough for a range of them to each of four threads; odd sizes all over.
SIZES = {"num_sentences": 9, "num_actions": 1037}


@pytest.fixture(params=[1, 2, 4], ids="{} threads".format)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def run_projection(function: Callable, selection: str, dtype: torch.dtype) -> dict[str, Tensor]:
    make = projection_inputs if function is plan_projection else hidden_inputs
    inputs = make(**SIZES, size=33, plan_size=21, dtype=dtype)
    options = projection_options(selection, "rows", **SIZES, dtype=dtype)
    outputs = function(**inputs, **options)
    found = dict(zip(outputs._fields, outputs, strict=True))
    if torch.is_grad_enabled():
        found |= gradients(outputs, leaves(inputs, options))
    return found


def run_addition(gated: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, plan = (torch.randn(rows, 4099, generator=generator).to(dtype).requires_grad_() for rows in (37, 5))
    ids = torch.tensor([-1, -1, *[0] * 9, -1, *[2] * 15, 3, 3, -1, *[4] * 6, -1])
    gate = torch.rand(4099, generator=generator).to(dtype).requires_grad_() if gated else None
    out = add_plan(x, plan, ids, gate)
    wanted = {"x": x, "plan": plan} | ({} if gate is None else {"gate": gate})
    return {"out": out} | (gradients([out], wanted) if torch.is_grad_enabled() else {})


def run_cross_entropy(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    head, states = torch.randn(117, 24, generator=generator), torch.randn(13, 24, generator=generator)
    target = torch.randint(117, (13,), generator=generator)
    target[[0, 3, 4, 12]] = -1  # padding
    logits = F.linear(states, head).to(dtype)  # made in the mode, as a model's are
    return dict(zip(("gradient", "loss"), cross_entropy_(logits, target), strict=True))


def run_attention(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, 190, heads, 16, generator=generator).to(dtype).requires_grad_() for heads in (4, 2, 2)
    )
    first = torch.zeros(3, 190, dtype=torch.int64)
    first[0, 71:], first[1, 5:], first[1, 150:] = 71, 5, 150
    out = packed_attention(query, key, value, first, 0.25)
    wanted = {"query": query, "key": key, "value": value}
    return {"out": out} | (gradients([out], wanted) if torch.is_grad_enabled() else {})


HALF, FULL = torch.bfloat16, torch.float32
CASES = {
    **{
        f"{function.__name__}, {selection}, {dtype}": lambda f=function, s=selection, d=dtype: run_projection(f, s, d)
        for function in (plan_projection, plan_projection_from_hidden)
        for selection in ("soft", "gumbel", "top-k", "straight-through")
        for dtype in (HALF, FULL, torch.float64)
    },
    **{
        f"add_plan, {'gate' if gated else 'no gate'}, {dtype}": lambda g=gated, d=dtype: run_addition(g, d)
        for gated in (True, False)
        for dtype in (HALF, FULL, torch.float64)
    },
    **{f"cross_entropy_, {dtype}": lambda d=dtype: run_cross_entropy(d) for dtype in (HALF, FULL)},
    "packed_attention": lambda: run_attention(HALF),
}


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_agrees_with_the_reference(case: Callable[[], dict[str, Tensor]], mode: Callable) -> None:
    with mode():
        with use_backend("reference"):
            want = case()
        with use_backend("cpp"):
            found = case()
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name].dtype == value.dtype and found[name].is_inference() == value.is_inference(), name
        # As exact as the precision that the mode multiplies in: two sums of bf16 products in different orders.
        half = value.dtype == HALF or torch.bfloat16 in (value.dtype, _multiplied_in(value.dtype, mode))
        error = (found[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-30)
        assert error <= (0.03 if half else 2e-5), f"{name}: {error:.2e}"


def _multiplied_in(dtype: torch.dtype, mode: Callable) -> torch.dtype:
    with mode():
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else dtype


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_mode_changes_no_value(case: Callable[[], dict[str, Tensor]]) -> None:
    with use_backend("cpp"):
        plain = case()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = case()
            assert all(torch.equal(found[name], plain[name].detach()) for name in found)
