"""float64 gradcheck of every public function in every selection and with every option."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from planlm.kernels import PlanProjection, add_plan, plan_projection, plan_projection_from_hidden

from .cases import (
    MIXINGS,
    SELECTIONS,
    STEPPED,
    assert_close,
    gradients,
    hidden_inputs,
    leaves,
    projection_inputs,
    projection_options,
    random,
)

pytestmark = pytest.mark.usefixtures("backend")

UPSTREAM_OF_A_STEP = {"straight-through": "soft", "gumbel-hard": "gumbel"}
PLANNER = ("logits", "noise", "hidden", "head", "head_bias")
"""Inputs through which a selection's scores are reached: numerically a step function has no gradient there."""


def gradcheck(function, inputs: dict, options: dict, frozen: tuple[str, ...] = ()) -> None:
    """torch's gradcheck with respect to every tensor that requires a gradient, save the frozen ones."""
    wanted = {name: value for name, value in leaves(inputs, options).items() if name not in frozen}

    def by_position(*values: Tensor) -> PlanProjection:
        given = dict(zip(wanted, values, strict=True))
        everything = {
            name: value.detach() if isinstance(value, Tensor) and name in frozen else value
            for name, value in {**inputs, **options, **given}.items()
        }
        return function(**everything)

    assert torch.autograd.gradcheck(by_position, tuple(wanted.values()), eps=1e-6, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_plan_projection(selection: str, mixing: str, bias: bool) -> None:
    inputs, options = projection_inputs(), projection_options(selection, mixing)
    if not bias:
        del inputs["bias"]
    gradcheck(plan_projection, inputs, options, PLANNER if selection in STEPPED else ())


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_plan_projection_from_hidden(selection: str, mixing: str) -> None:
    inputs, options = hidden_inputs(), projection_options(selection, mixing)
    gradcheck(plan_projection_from_hidden, inputs, options, PLANNER if selection in STEPPED else ())


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("function", [plan_projection, plan_projection_from_hidden])
@pytest.mark.parametrize("selection", STEPPED)
def test_a_step_sends_the_soft_gradient_to_the_planner(selection: str, function, mixing: str) -> None:
    inputs = projection_inputs() if function is plan_projection else hidden_inputs()
    options = projection_options(selection, mixing)
    step = function(**inputs, **options)
    soft = function(**inputs, **{**options, "selection": UPSTREAM_OF_A_STEP[selection]})
    planner = {name: value for name, value in leaves(inputs, options).items() if name in PLANNER}
    assert planner
    found, expected = gradients(step, planner), gradients(soft, planner)
    for name in planner:
        assert_close(f"gradient of {name}", found[name], expected[name], 1e-12)
        assert found[name].any()


@pytest.mark.parametrize("selection", STEPPED)
def test_a_step_teaches_only_the_chosen_action(selection: str) -> None:
    inputs, options = projection_inputs(), projection_options(selection)
    scores = inputs["logits"] + options.get("noise", 0.0)
    chosen = torch.zeros(7, dtype=torch.bool).index_fill(0, scores.argmax(dim=1), True)
    projected = plan_projection(**inputs, **options).projected
    gradient = gradients([projected], {"codebook": inputs["codebook"]})["codebook"]
    assert torch.equal(gradient.any(dim=1), chosen)


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("ids", [[0, 0, 1, 1, 1, 3], [-1, 0, -1, 2, 2, -1], [-1] * 6, [3] * 6], ids=str)
def test_add_plan(ids: list[int], gated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, plan, gate = random(6, 3, generator=generator), random(4, 3, generator=generator), random(3, generator=generator)
    segment_ids = torch.tensor(ids)
    inputs = (x, plan, gate) if gated else (x, plan)
    assert torch.autograd.gradcheck(lambda x, plan, *gate: add_plan(x, plan, segment_ids, *gate), inputs)


def test_chain_of_both() -> None:
    inputs, options = projection_inputs(), projection_options("soft", "number")
    states = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    segment_ids = torch.tensor([0, 0, -1, 1, 3, 3, 4, -1])

    def block(*values: Tensor) -> Tensor:
        projected = plan_projection(*values, **options).projected
        first, second = projected.split(2, dim=1)
        return add_plan(add_plan(states, first, segment_ids).tanh(), second, segment_ids)

    assert torch.autograd.gradcheck(block, tuple(inputs.values()))


@pytest.mark.parametrize("name", ["logits", "codebook", "weight", "noise", "oracle_weight"])
def test_second_derivatives_of_plan_projection_are_refused(name: str) -> None:
    inputs, options = projection_inputs(), projection_options("gumbel", "rows")
    projected = plan_projection(**inputs, **options).projected
    leaf = leaves(inputs, options)[name]
    (gradient,) = torch.autograd.grad(projected.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["hidden", "head", "head_bias"])
def test_second_derivatives_from_hidden_are_refused(name: str) -> None:
    inputs = hidden_inputs()
    projected = plan_projection_from_hidden(**inputs).projected
    (gradient,) = torch.autograd.grad(projected.square().sum(), inputs[name], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


@pytest.mark.parametrize("index", [0, 1, 2], ids=["x", "plan", "gate"])
def test_second_derivatives_of_add_plan_are_refused(index: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [random(*shape, generator=generator) for shape in ((4, 3), (2, 3), (3,))]
    result = add_plan(inputs[0], inputs[1], torch.tensor([0, 0, 1, -1]), inputs[2])
    (gradient,) = torch.autograd.grad(result.square().sum(), inputs[index], create_graph=True)
    with pytest.raises(RuntimeError, match="leave create_graph off"):
        gradient.sum().backward()
