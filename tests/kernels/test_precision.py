"""Half precision, mixed dtypes and autocast: what is computed in what, and how far from float64 it may be."""

from __future__ import annotations

import pytest
import torch

from planlm.kernels import add_plan, plan_projection, plan_projection_from_hidden

from .cases import (
    HALVES,
    SELECTIONS,
    assert_close,
    assert_same,
    gradients,
    hidden_inputs,
    in_float64,
    projection_inputs,
    projection_options,
    random,
    relative_error,
    run,
    truth,
)
from .naive import plan_projection_eager

pytestmark = pytest.mark.usefixtures("backend")

SHAPE = (65, 130, 33, 47)


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("mixing", ["unlabelled", "number", "rows"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_no_worse_than_eager(dtype: torch.dtype, selection: str, mixing: str, scale: float) -> None:
    inputs = projection_inputs(*SHAPE, dtype=dtype)
    inputs["logits"] = (inputs["logits"].detach() * scale).requires_grad_()
    options = projection_options(selection, mixing, *SHAPE[:2], dtype=dtype)
    (got, ours), (eager, theirs) = (
        run(function, inputs, options) for function in (plan_projection, plan_projection_eager)
    )
    want, exact = truth(plan_projection, inputs, options)
    for name, value, usual, expected in zip(got._fields, got, eager, want, strict=True):
        assert relative_error(value, expected) <= relative_error(usual, expected) + 1e-3, name
    for name, expected in exact.items():
        assert ours[name].dtype == dtype
        error, usual = relative_error(ours[name], expected), relative_error(theirs[name], expected)
        assert error <= usual + 1e-3, f"gradient of {name}: relative error {error:.3g}, eager's {usual:.3g}"


@pytest.mark.parametrize("mixing", ["unlabelled", "rows"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_float32_is_within_1e_5(selection: str, mixing: str) -> None:
    inputs = projection_inputs(*SHAPE, dtype=torch.float32)
    options = projection_options(selection, mixing, *SHAPE[:2], dtype=torch.float32)
    assert_same(run(plan_projection, inputs, options), truth(plan_projection, inputs, options), 1e-5)


@pytest.mark.parametrize(
    ("logits", "codebook", "weight", "projected", "statistics"),
    [
        ("float32", "float32", "float32", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16", "bfloat16", "float32"),
        ("float32", "float32", "bfloat16", "float32", "float32"),
        ("bfloat16", "float32", "float32", "float32", "float32"),
        ("float16", "float16", "bfloat16", "float32", "float32"),
        ("float64", "float32", "float32", "float32", "float64"),
        ("float32", "float64", "float32", "float64", "float64"),
    ],
)
def test_dtypes_of_the_results(logits: str, codebook: str, weight: str, projected: str, statistics: str) -> None:
    dtypes = {"logits": logits, "codebook": codebook, "weight": weight}
    inputs = {
        name: value.detach().to(getattr(torch, dtypes.get(name, "float32"))).requires_grad_()
        for name, value in projection_inputs().items()
    }
    result = plan_projection(**inputs, oracle=torch.tensor([0, 1, 2, 3, -1]))
    assert result.projected.dtype == getattr(torch, projected)
    assert result.log_normalizer.dtype == result.oracle_nll.dtype == getattr(torch, statistics)
    for name, gradient in gradients(result, inputs).items():
        assert gradient.dtype == inputs[name].dtype, name


def test_half_precision_logits_are_never_formed() -> None:
    inputs = hidden_inputs(9, 40, 64, dtype=torch.bfloat16)
    got = plan_projection_from_hidden(**inputs, oracle=torch.arange(9))
    want = plan_projection_from_hidden(**in_float64(inputs), oracle=torch.arange(9))
    assert_close("log_normalizer", got.log_normalizer, want.log_normalizer, 1e-5)
    assert_close("oracle_nll", got.oracle_nll, want.oracle_nll, 1e-5)


def test_autocast_casts_the_matrices_and_leaves_the_logits() -> None:
    inputs = projection_inputs(*SHAPE, dtype=torch.float32)
    oracle = torch.arange(65)
    want = plan_projection(
        inputs["logits"], inputs["codebook"].bfloat16(), inputs["weight"].bfloat16(), inputs["bias"], oracle=oracle
    )
    with torch.autocast("cpu", torch.bfloat16):
        got = plan_projection(**inputs, oracle=oracle)
    assert got.projected.dtype == torch.bfloat16
    for value, expected in zip(got, want, strict=True):
        assert torch.equal(value, expected)
    for name, gradient in gradients(got, inputs).items():
        assert gradient.dtype == torch.float32, name


def test_autocast_from_hidden() -> None:
    inputs = hidden_inputs(*SHAPE[:2], 20, *SHAPE[2:], dtype=torch.float32)
    halves = {name: value if "bias" in name else value.bfloat16() for name, value in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = plan_projection_from_hidden(**inputs)
    for value, expected in zip(got, plan_projection_from_hidden(**halves), strict=True):
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)


def test_autocast_leaves_float64_and_add_plan_alone() -> None:
    inputs = projection_inputs()
    x, plan = torch.randn(5, 4), torch.randn(3, 4)
    ids = torch.tensor([0, 1, 1, 2, -1])
    want = plan_projection(**inputs).projected
    with torch.autocast("cpu", torch.bfloat16):
        got, added = plan_projection(**inputs).projected, add_plan(x, plan, ids)
    assert got.dtype == torch.float64
    assert torch.equal(got, want)
    assert torch.equal(added, x + torch.cat([plan[[0, 1, 1, 2]], torch.zeros(1, 4)]))


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_add_plan_is_no_worse_than_eager(dtype: torch.dtype, gated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": random(400, 33, generator=generator, dtype=dtype),
        "plan": random(5, 33, generator=generator, dtype=dtype),
    }
    if gated:
        inputs["gate"] = random(33, generator=generator, dtype=dtype)
    ids = torch.arange(400) // 80
    exact = in_float64(inputs)
    got, want = add_plan(segment_ids=ids, **inputs), add_plan(segment_ids=ids, **exact)
    eager = inputs["x"] + inputs.get("gate", 1) * inputs["plan"][ids]
    assert got.dtype == dtype
    assert relative_error(got, want) <= relative_error(eager, want) + 1e-3
    ours, theirs, truths = gradients([got], inputs), gradients([eager], inputs), gradients([want], exact)
    for name in inputs:
        assert ours[name].dtype == dtype
        assert relative_error(ours[name], truths[name]) <= relative_error(theirs[name], truths[name]) + 1e-3, name


@pytest.mark.parametrize("plan_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_add_plan_keeps_the_dtype_of_the_states(x_dtype: torch.dtype, plan_dtype: torch.dtype) -> None:
    x, plan = torch.randn(4, 3).to(x_dtype).requires_grad_(), torch.randn(2, 3).to(plan_dtype).requires_grad_()
    result = add_plan(x, plan, torch.tensor([0, 0, 1, -1]))
    assert result.dtype == x_dtype
    assert [value.dtype for value in torch.autograd.grad(result.sum(), [x, plan])] == [x_dtype, plan_dtype]
