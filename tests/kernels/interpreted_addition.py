"""`add_plan` on Triton's interpreter: values and gradients against the reference in float64; see interpreted.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from planlm.kernels import StackedPlan, add_plan, reference, triton_addition, use_backend

from .cases import HALVES, assert_close, gradients, in_float64, random, seeded, sorted_ids, upstream
from .conftest import operators


@pytest.mark.parametrize("gated", [True, False])
def test_opcheck_addition(gated: bool) -> None:
    x, plan = torch.randn(6, 4, requires_grad=True), torch.randn(3, 8, requires_grad=True)[:, 2:6]
    gate = torch.randn(4, requires_grad=True) if gated else None
    ids = torch.tensor([0, -1, 0, 1, 2, 2])
    with use_backend("triton"):
        add_plan(x, plan, ids, gate)
    torch.library.opcheck(operators().add_plan.default, (x, plan, ids, gate))


def bounds_by_hand(ids: Tensor, num_segments: int) -> list[int]:
    """Where each segment's tokens begin, and the end: of an empty one where the next begins."""
    found = [
        next((at for at, one in enumerate(ids.tolist()) if one >= segment), len(ids)) for segment in range(num_segments)
    ]
    return [*found, len(ids)]


def check_addition(inputs: dict[str, Tensor], ids: Tensor, tolerance: float) -> None:
    """`add_plan` and its gradients within `tolerance` of the reference."""
    x, plan, gate = inputs["x"].detach(), inputs["plan"].detach(), inputs.get("gate")
    gate = None if gate is None else gate.detach()
    got = triton_addition.add_plan(x, plan, ids, gate)
    assert got.dtype == x.dtype
    precise = in_float64(inputs)
    want = reference.add_plan(segment_ids=ids, **precise)
    assert_close("result", got, want, tolerance)
    (up,) = upstream([got])
    grad_plan, grad_gate = triton_addition.add_plan_backward(up, plan, ids, gate, [True, gate is not None])
    wanted = gradients([want], precise)
    bounds = triton_addition.segment_bounds(ids, len(plan))
    assert bounds.tolist() == bounds_by_hand(ids, len(plan)) and bounds.dtype == torch.int32
    assert grad_plan.dtype == plan.dtype
    assert_close("gradient of plan", grad_plan, wanted["plan"], tolerance)
    if gate is not None:
        assert grad_gate.dtype == gate.dtype
        assert_close("gradient of gate", grad_gate, wanted["gate"], tolerance)


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (40, 3, 17), (130, 9, 20), (40, 1, 16), (3, 9, 2), (0, 4, 3), (0, 0, 3), (6, 0, 3)], ids=str
)
def test_add_plan(shape: tuple[int, int, int], gated: bool) -> None:
    num_tokens, num_segments, size = shape
    generator = seeded(1)
    inputs = {
        "x": random(num_tokens, size, generator=generator, dtype=torch.float32),
        "plan": random(num_segments, size, generator=generator, dtype=torch.float32),
    }
    if gated:
        inputs["gate"] = random(size, generator=generator, dtype=torch.float32)
    check_addition(inputs, sorted_ids(num_tokens, num_segments), 1e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_add_plan_in_half_precision(dtype: torch.dtype) -> None:
    generator = seeded(1)
    inputs = {name: random(*shape, generator=generator, dtype=dtype) for name, shape in
              {"x": (130, 20), "plan": (9, 20), "gate": (20,)}.items()}  # fmt: skip
    # One rounding, to the nearest.
    check_addition(inputs, sorted_ids(130, 9), torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize(
    "ids",
    [
        [-1] * 100,
        [-1] * 50 + [3] + [-1] * 49,
        [0] + [-1] * 98 + [6],
        [-1, -1] + [2] * 40 + [-1] * 30 + [2] * 3 + [5] * 25,
        [6] * 100,
        [0] * 100,
        [index // 16 for index in range(100)],
    ],
    ids=["all holes", "one token", "ends", "holes within", "last", "first", "windows"],
)
def test_segments_are_found(ids: list[int]) -> None:
    generator = seeded(1)
    inputs = {name: random(*shape, generator=generator, dtype=torch.float32) for name, shape in
              {"x": (100, 3), "plan": (7, 3), "gate": (3,)}.items()}  # fmt: skip
    check_addition(inputs, torch.tensor(ids), 1e-5)


def test_segments_are_found_among_many_tokens() -> None:
    ids = torch.arange(4000) // 900
    ids[::3] = -1
    ids[800:2000] = -1
    up = torch.arange(4000, dtype=torch.float32)[:, None] % 17
    grad_plan, _ = triton_addition.add_plan_backward(up, torch.zeros(5, 1), ids, None, [True, False])
    want = torch.zeros(5, 1, dtype=torch.float64).index_add_(0, ids[ids >= 0], up[ids >= 0].double())
    assert_close("gradient of plan", grad_plan, want, 1e-5)


def test_gradients_of_tokens_without_a_plan_reach_none() -> None:
    """Whatever they are: they are read with the others'."""
    ids = torch.tensor([-1, 0, -1, 0, -1, -1, 2, -1])
    up = torch.where(ids[:, None] < 0, torch.tensor([torch.inf, -torch.inf, torch.nan]), 1.0)
    grad_plan, grad_gate = triton_addition.add_plan_backward(up, torch.ones(3, 3), ids, torch.ones(3), [True, True])
    assert grad_plan.tolist() == [[2.0] * 3, [0.0] * 3, [1.0] * 3]
    assert grad_gate.tolist() == [3.0] * 3


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_no_plan_changes_no_bit(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.finfo(dtype).tiny, -1.5], dtype=dtype)
    x, plan = special.expand(5, -1).contiguous(), torch.randn(2, 6).to(dtype)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    got = triton_addition.add_plan(x, plan, torch.tensor([-1, 0, -1, 1, -1]), torch.zeros(6, dtype=dtype))
    assert torch.equal(got[::2].view(integers), x[::2].view(integers))


def test_add_plan_of_a_column_slice_and_other_strides() -> None:
    generator = seeded(0)
    stacked, x = torch.randn(4, 51, generator=generator), torch.randn(30, 17, generator=generator)
    part, ids, gate = stacked[:, 17:34], sorted_ids(30, 4), torch.randn(17, generator=generator)
    want = triton_addition.add_plan(x, part.contiguous(), ids, gate)
    doubled = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(triton_addition.add_plan(doubled, part, ids, gate), want)
    grads = triton_addition.add_plan_backward(x, part.contiguous(), ids, gate, [True, True])
    for got, value in zip(
        triton_addition.add_plan_backward(doubled, part, ids, gate, [True, True]), grads, strict=True
    ):
        assert torch.equal(got, value)
    assert torch.equal(triton_addition.add_plan_backward(x, part, ids, gate, [False, True])[1], grads[1])
    one = torch.ones(()).expand(30, 17)
    expanded = triton_addition.add_plan_backward(one, part, ids, None, [True, False])[0]
    assert torch.equal(
        expanded, triton_addition.add_plan_backward(torch.ones(30, 17), part, ids, None, [True, False])[0]
    )


def stacked(widths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], list[Tensor]]:
    """`projected` and each layer's `x` and gate, as leaves; and the layers' random upstream gradients."""
    generator = seeded(2)
    inputs = {"projected": random(5, sum(widths), generator=generator, dtype=dtype)}
    for layer, width in enumerate(widths):
        inputs[f"x{layer}"] = random(12, width, generator=generator, dtype=dtype)
        inputs[f"gate{layer}"] = random(width, generator=generator, dtype=dtype)
    return inputs, [torch.randn(12, width, generator=generator).to(dtype) for width in widths]


def plan_layers(inputs: dict[str, Tensor], widths: tuple[int, ...], gated: bool, together: bool) -> list[Tensor]:
    """Every layer planned: by `StackedPlan`, or by `add_plan` on columns."""
    ids = sorted_ids(12, 5)
    gates = [inputs[f"gate{layer}"] if gated else None for layer in range(len(widths))]
    if together:
        plan = StackedPlan(inputs["projected"], widths)
        return [plan.add(layer, inputs[f"x{layer}"], ids, gate) for layer, gate in enumerate(gates)]
    plans = inputs["projected"].split(list(widths), dim=1)
    return [add_plan(inputs[f"x{n}"], plan, ids, gate) for n, (plan, gate) in enumerate(zip(plans, gates, strict=True))]


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("widths", [(4, 7, 5), (9,)], ids=str)
def test_stacked_plan_is_add_plan_on_columns(widths: tuple[int, ...], gated: bool) -> None:
    inputs, ups = stacked(widths)
    wanted = [value for name, value in inputs.items() if gated or not name.startswith("gate")]
    with use_backend("triton"):
        found = [plan_layers(inputs, widths, gated, together) for together in (True, False)]
    gradients_of = [torch.autograd.grad(outputs, wanted, ups) for outputs in found]
    for mine, theirs in zip((*found[0], *gradients_of[0]), (*found[1], *gradients_of[1]), strict=True):
        assert torch.equal(mine, theirs)


def test_stacked_plan_s_gradient_is_not_gathered() -> None:
    inputs, ups = stacked((4, 7, 5))
    with use_backend("triton"):
        outputs = plan_layers(inputs, (4, 7, 5), gated=False, together=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.autograd.grad(outputs, inputs["projected"], ups)
    assert "aten::cat" not in {event.name for event in profiler.events()}


def test_stacked_plan_used_in_other_ways() -> None:
    """Twice a layer, some layers, one layer's plan alone, the graph again: always as with columns of their own."""
    widths = (4, 7, 5)
    inputs, ups = stacked(widths)
    ids, projected = sorted_ids(12, 5), inputs["projected"]
    with use_backend("triton"):
        results = []
        for together in (True, False):
            plan = StackedPlan(projected, widths)
            plans = plan.plans if together else projected.split(list(widths), dim=1)

            def add(layer: int, plan=plan, plans=plans, together=together) -> Tensor:
                x = inputs[f"x{layer}"]
                return plan.add(layer, x, ids) if together else add_plan(x, plans[layer], ids)

            first, again, third = add(0), add(0), add(2)
            found = list(torch.autograd.grad([first], [plans[0]], [ups[0]], retain_graph=True))  # not to the split
            outputs, of_outputs = [first, again, third], [ups[0], 2 * ups[0], ups[2]]
            for _ in range(2):
                found += torch.autograd.grad(outputs, [projected, inputs["x0"]], of_outputs, retain_graph=True)
            found += torch.autograd.grad([third], [projected], [ups[2]])
            results.append(found)
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


def test_stacked_plan_has_first_derivatives_only() -> None:
    inputs, ups = stacked((4, 5))
    ups = [up.requires_grad_() for up in ups]
    with use_backend("triton"):
        outputs = plan_layers(inputs, (4, 5), gated=True, together=True)
    for name in ("projected", "x0", "gate1"):
        (grad,) = torch.autograd.grad(outputs, [inputs[name]], ups, create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            grad.sum().backward()
