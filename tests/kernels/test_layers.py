"""`StackedPlan` on the CPU; on Triton: interpreted_addition.py."""

from __future__ import annotations

import pytest
import torch

from planlm.kernels import StackedPlan, add_plan

IDS = torch.tensor([0, 0, -1, 1, 2, 2])


@pytest.mark.parametrize("widths", [(4, 7), (9,)], ids=str)
def test_stacked_plan_is_add_plan_on_columns(widths: tuple[int, ...]) -> None:
    projected = torch.randn(3, sum(widths), requires_grad=True)
    states = [torch.randn(6, width, requires_grad=True) for width in widths]
    gate = torch.randn(widths[-1], requires_grad=True)
    gates = [None] * (len(widths) - 1) + [gate]
    plan, plans = StackedPlan(projected, widths), projected.split(list(widths), dim=1)
    mine = [plan.add(layer, x, IDS, gates[layer]) for layer, x in enumerate(states)]
    theirs = [add_plan(x, plans[layer], IDS, gates[layer]) for layer, x in enumerate(states)]
    ups = [torch.randn_like(x) for x in states]
    leaves = [projected, gate, *states]
    mine += torch.autograd.grad(mine, leaves, ups)
    theirs += torch.autograd.grad(theirs, leaves, ups)
    assert all(map(torch.equal, mine, theirs))


def test_stacked_plan_compiles_without_breaks() -> None:
    def plan_all(projected: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        plan = StackedPlan(projected, (4, 4))
        return plan.add(1, plan.add(0, x, IDS), IDS)

    projected, x = torch.randn(3, 8, requires_grad=True), torch.randn(6, 4)
    compiled = torch.compile(plan_all, fullgraph=True, backend="aot_eager")
    up = torch.randn(6, 4)
    assert torch.equal(compiled(projected, x), plan_all(projected, x))
    grads = [torch.autograd.grad(function(projected, x), projected, up)[0] for function in (compiled, plan_all)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("widths", [(4, 3), ()], ids=str)
def test_widths_that_do_not_add_up_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="widths: got"):
        StackedPlan(torch.randn(3, 8), widths)
