"""The C++ operators with a range of the actions for every thread, as there are where actions are many."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from planlm.kernels import cpp, plan_projection, plan_projection_from_hidden, use_backend

from .cases import (
    MIXINGS,
    assert_close,
    assert_same,
    gradients,
    hidden_inputs,
    in_float64,
    leaves,
    projection_inputs,
    projection_options,
    run,
    truth,
)

pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))

# Three threads get 288, 288 and 200 of the actions, two 416 and 360.
SIZES = {"num_sentences": 6, "num_actions": 776}


@pytest.fixture(params=[1, 2, 3], ids=lambda number: f"{number} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("selection", ["soft", "gumbel", "top-k", "straight-through"])
@pytest.mark.parametrize("function", [plan_projection, plan_projection_from_hidden], ids=lambda f: f.__name__)
def test_ranges_add_up(threads: int, function, selection: str, mixing: str) -> None:
    make = projection_inputs if function is plan_projection else hidden_inputs
    inputs = make(**SIZES, dtype=torch.float32)
    options = projection_options(selection, mixing, **SIZES, dtype=torch.float32)
    with use_backend("cpp"):
        got, again = run(function, inputs, options), run(function, inputs, options)
    assert_same(got, truth(function, inputs, options), 1e-5)
    assert all(map(torch.equal, got[0], again[0])), "outputs do not repeat"
    for name, gradient in got[1].items():
        assert torch.equal(gradient, again[1][name]), f"gradient of {name} does not repeat"


@pytest.mark.parametrize("filled", [slice(0, 288), slice(288, 576), slice(576, 776)], ids=["first", "middle", "last"])
def test_ranges_without_a_finite_score_count_for_nothing(threads: int, filled: slice) -> None:
    inputs = projection_inputs(**SIZES, dtype=torch.float32)
    logits = torch.full_like(inputs["logits"], -torch.inf)
    logits[:, filled] = inputs["logits"].detach()[:, filled]
    logits[5] = -torch.inf  # nowhere a score
    logits[4, 100] = torch.nan
    oracle = torch.tensor([filled.start, filled.stop - 1, -1, filled.start + 7, 0, 0])
    inputs["logits"] = logits.requires_grad_()
    with use_backend("cpp"):
        got = plan_projection(**inputs, oracle=oracle, temperature=0.5)
        grad = gradients([value[:4] for value in got], leaves(inputs, {}))["logits"]
    with use_backend("reference"):
        exact = in_float64(inputs)
        want = plan_projection(**exact, oracle=oracle, temperature=0.5)
        grad_wanted = gradients([value[:4] for value in want], leaves(exact, {}))["logits"]
    for name, value, wanted in zip(got._fields, got, want, strict=True):
        assert_close(name, value[:4], wanted[:4], 1e-5)
        assert value[4:].isnan().all(), name
    assert_close("gradient of logits", grad[:4], grad_wanted[:4], 1e-5)


def test_the_first_of_equals_is_the_largest_in_whatever_range(threads: int) -> None:
    inputs = projection_inputs(**SIZES, dtype=torch.float32)
    logits = torch.zeros_like(inputs["logits"])
    for row, actions in enumerate([(300, 700), (10, 300), (0, 775), (287, 288), (575, 576), (775,)]):
        logits[row, list(actions)] = 3.0
    inputs["logits"] = logits
    with use_backend("cpp"):
        chosen = plan_projection(**inputs, selection="hard").projected
    first = torch.tensor([300, 10, 0, 287, 575, 775])
    assert_close("projected", chosen, inputs["codebook"][first] @ inputs["weight"].t() + inputs["bias"], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", [plan_projection, plan_projection_from_hidden], ids=lambda f: f.__name__)
def test_ranges_sum_over_several_tiles_of_rows(threads: int, function, dtype: torch.dtype) -> None:
    """More rows than a tile has at most, 8192."""
    sizes = {"num_sentences": 8200, "num_actions": 776, "size": 2, "plan_size": 2}
    if function is plan_projection_from_hidden:
        sizes["state_size"] = 2
    inputs = (projection_inputs if function is plan_projection else hidden_inputs)(**sizes, dtype=dtype)
    with use_backend("cpp"):
        _, found = run(function, inputs, {})
    for name, gradient in truth(function, inputs, {})[1].items():
        assert_close(f"gradient of {name}", found[name], gradient, 1e-5 if dtype == torch.float32 else 3e-2)
