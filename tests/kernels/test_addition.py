"""`add_plan`: values, gradients, bit-exactness without a plan, shapes and strides."""

from __future__ import annotations

import itertools

import pytest
import torch

from planlm.kernels import add_plan

from .cases import assert_close, gradients, random, sorted_ids, upstream
from .naive import add_plan_loop

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (7, 3, 5), (40, 1, 1), (3, 9, 2), (130, 17, 33), (0, 4, 3), (0, 0, 3), (6, 0, 3)], ids=str
)
def test_agrees_with_a_loop(shape: tuple[int, int, int], gated: bool) -> None:
    num_tokens, num_segments, size = shape
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "x": random(num_tokens, size, generator=generator),
        "plan": random(num_segments, size, generator=generator),
    }
    if gated:
        inputs["gate"] = random(size, generator=generator)
    ids = sorted_ids(num_tokens, num_segments)
    got, want = add_plan(segment_ids=ids, **inputs), add_plan_loop(segment_ids=ids, **inputs)
    assert_close("result", got, want, 1e-14)
    found = gradients([got], inputs)
    expected = gradients([want], inputs) if want.requires_grad else {name: 0 * inputs[name] for name in inputs}
    for name in inputs:
        assert_close(f"gradient of {name}", found[name], expected[name], 1e-12)


@pytest.mark.parametrize("gate", [None, -1.0, 0.0], ids=["no gate", "negative gate", "zero gate"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_no_plan_changes_no_bit(dtype: torch.dtype, gate: float | None) -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.finfo(dtype).tiny, -1.5], dtype=dtype)
    x = torch.cat([special.expand(2, -1), torch.randn(3, 6).to(dtype)])
    plan = torch.randn(2, 6).to(dtype)
    gates = None if gate is None else torch.full((6,), gate, dtype=dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    alone = add_plan(x, plan, torch.full((5,), -1), gates)
    assert torch.equal(alone.view(integers), x.view(integers))
    mixed = add_plan(x, plan, torch.tensor([-1, 0, -1, 1, -1]), gates)
    assert torch.equal(mixed[::2].view(integers), x[::2].view(integers))


def test_no_plan_gives_no_gradient_to_the_plan() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {"x": random(5, 3, generator=generator), "plan": random(2, 3, generator=generator)}
    found = gradients([add_plan(segment_ids=torch.full((5,), -1), **inputs)], inputs)
    assert not found["plan"].any()
    assert torch.equal(found["x"], upstream([inputs["x"]])[0])


def test_column_slice_of_a_stacked_projection() -> None:
    generator = torch.Generator().manual_seed(0)
    stacked, x = random(4, 15, generator=generator), random(9, 5, generator=generator)
    ids = sorted_ids(9, 4)
    part = stacked[:, 5:10]
    assert not part.is_contiguous()
    got, want = add_plan(x, part, ids), add_plan(x, part.contiguous(), ids)
    assert torch.equal(got, want)
    found, expected = (gradients([result], {"x": x, "stacked": stacked}) for result in (got, want))
    assert torch.equal(found["stacked"], expected["stacked"])
    assert torch.equal(found["x"], expected["x"])


def test_strides_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    x, plan, gate = (random(*shape, generator=generator).detach() for shape in ((8, 4), (3, 4), (4,)))
    ids = sorted_ids(8, 3)
    want = add_plan(x, plan, ids, gate)
    doubled = [torch.stack([value, value], dim=-1)[..., 0] for value in (x, plan, ids, gate)]
    assert not any(value.is_contiguous() for value in doubled)
    assert torch.equal(add_plan(*doubled), want)
    assert torch.equal(add_plan(x.T.contiguous().T, plan, ids, gate), want)
    row = torch.ones(1, dtype=torch.float64)
    assert torch.equal(add_plan(x, plan, ids, row.expand(4)), add_plan(x, plan, ids))


def test_any_input_may_be_without_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": random(8, 4, generator=generator),
        "plan": random(3, 4, generator=generator),
        "gate": random(4, generator=generator),
    }
    ids = sorted_ids(8, 3)
    whole = gradients([add_plan(segment_ids=ids, **inputs)], inputs)
    for size in (1, 2):
        for chosen in itertools.combinations(inputs, size):
            now = {name: value.detach().requires_grad_(name in chosen) for name, value in inputs.items()}
            found = gradients([add_plan(segment_ids=ids, **now)], {name: now[name] for name in chosen})
            for name, gradient in found.items():
                assert_close(f"gradient of {name} beside {chosen}", gradient, whole[name], 1e-13)


def test_the_same_bits_every_time() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        runs = []
        for _ in range(4):
            generator = torch.Generator().manual_seed(0)
            # Two segments, so that every thread has tokens to add to the same row.
            inputs = {
                "x": random(20000, 65, generator=generator, dtype=torch.float32),
                "plan": random(2, 65, generator=generator, dtype=torch.float32),
                "gate": random(65, generator=generator, dtype=torch.float32),
            }
            result = add_plan(segment_ids=sorted_ids(20000, 2), **inputs)
            runs.append([result, *gradients([result], inputs).values()])
    finally:
        torch.set_num_threads(threads)
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again, strict=True))


def test_the_states_are_left_as_they_were() -> None:
    x, plan = torch.randn(4, 3), torch.randn(2, 3)
    before = x.clone()
    add_plan(x, plan, torch.tensor([0, 0, 1, -1])).add_(1.0)
    assert torch.equal(x, before)
