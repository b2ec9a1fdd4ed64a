"""The table of selections says what the kernels and the model do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from planlm.kernels import plan_projection, reference
from planlm.selections import SELECTIONS

CONDITIONED = [name for name, about in SELECTIONS.items() if name != "none" and not about.needs_others]
"""What is computed from a sentence's own logits. The others are `soft` with another's: tests/model/test_modeling.py."""


def project(name: str, logits: torch.Tensor, **changes: Any) -> torch.Tensor:
    """The plans of three sentences from four actions, none of which is another's mean."""
    about = SELECTIONS[name]
    codebook = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 1.0], [0.5, -4.0]])
    options: dict[str, Any] = {"top_k": 2} if about.needs_top_k else {}
    if about.needs_oracle:
        options["oracle"] = torch.tensor([0, 1, 2])
    return plan_projection(logits, codebook, torch.eye(2), selection=name, **{**options, **changes}).projected


def scores() -> torch.Tensor:
    return torch.tensor([[0.5, 0.25, -1.0, 0.0], [1.0, 2.0, 0.0, -2.0], [0.0, 0.5, 1.0, 1.5]], requires_grad=True)


def test_kernels_know_every_selection_that_conditions() -> None:
    assert set(reference.SELECTIONS) == set(CONDITIONED)
    assert set(reference.MIXED) == {name for name in CONDITIONED if SELECTIONS[name].mixes}
    assert set(reference.NOISY) == {name for name, about in SELECTIONS.items() if about.noisy}
    straight = {name for name, about in SELECTIONS.items() if about.hard_forward and about.trains_planner}
    assert set(reference.STRAIGHT_THROUGH) == straight


@pytest.mark.parametrize("name", CONDITIONED)
def test_the_plan_is_what_the_table_says(name: str) -> None:
    about, logits = SELECTIONS[name], scores()
    plan = project(name, logits)
    assert torch.equal(plan, project(name, -logits)) is not about.asks_planner
    most_probable = project("oracle", logits, oracle=logits.argmax(dim=1))
    assert torch.equal(plan, most_probable) is about.hard_forward
    gradient = None
    if plan.requires_grad:
        (gradient,) = torch.autograd.grad(plan.square().sum(), logits, allow_unused=True)
    assert bool(gradient is not None and gradient.any()) is about.trains_planner


@pytest.mark.parametrize("name", CONDITIONED)
def test_each_takes_what_it_needs_and_nothing_else(name: str) -> None:
    about, logits = SELECTIONS[name], scores()
    for needed, changes in (
        (about.needs_oracle, {"oracle": None}),
        (about.needs_top_k, {"top_k": None}),
        (not about.needs_top_k, {"top_k": 2}),
        (not about.noisy, {"noise": torch.ones(3, 4)}),
    ):
        if needed:
            with pytest.raises(ValueError, match=f"^{next(iter(changes))}: "):
                project(name, logits, **changes)
        else:
            project(name, logits, **changes)


def test_the_method_lists_them() -> None:
    text = (Path(__file__).parents[1] / "docs" / "method.md").read_text()
    table = re.findall(r"^\| `([a-z-]+)` \| .* \| (yes|no) \|", text, re.MULTILINE)
    assert table == [(name, "yes" if about.trains_planner else "no") for name, about in SELECTIONS.items()]
