"""Values and gradients of `plan_projection` and `plan_projection_from_hidden` against loops and each other."""

from __future__ import annotations

import itertools

import pytest
import torch

from planlm.kernels import plan_projection, plan_projection_from_hidden

from .cases import (
    MIXINGS,
    PLANNING,
    SELECTIONS,
    STEPPED,
    assert_close,
    assert_same,
    gradients,
    hidden_inputs,
    in_float64,
    leaves,
    projection_inputs,
    projection_options,
    run,
    upstream,
)
from .naive import plan_projection_loop

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = [(1, 1, 1, 1), (1, 9, 3, 2), (2, 1, 4, 3), (6, 2, 1, 5), (3, 17, 5, 1), (33, 65, 7, 9)]
"""S, K, A, D: every size 1 somewhere, and nothing a multiple of a tile."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_agrees_with_loops(selection: str, mixing: str, shape: tuple[int, int, int, int]) -> None:
    inputs = projection_inputs(*shape)
    options = projection_options(selection, mixing, *shape[:2])
    got = plan_projection(**inputs, **options)
    want = plan_projection_loop(**inputs, **options)
    wanted = leaves(inputs, options)
    if selection in STEPPED:  # the loops know no step gradient: test_gradients.py has it
        del wanted["logits"]
        wanted.pop("noise", None)
    assert_same((got, gradients(got, wanted)), (want, gradients(want, wanted)), 1e-12, 1e-11)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_from_hidden_is_plan_projection_of_the_logits(selection: str, mixing: str) -> None:
    inputs, options = hidden_inputs(), projection_options(selection, mixing)
    got = plan_projection_from_hidden(**inputs, **options)
    logits = inputs["hidden"] @ inputs["head"].T + inputs["head_bias"]
    want = plan_projection(logits, inputs["codebook"], inputs["weight"], inputs["bias"], **options)
    wanted = leaves(inputs, options)
    assert_same((got, gradients(got, wanted)), (want, gradients(want, wanted)), 1e-12)


def test_from_hidden_without_biases() -> None:
    inputs = hidden_inputs()
    got = plan_projection_from_hidden(inputs["hidden"], inputs["head"], None, inputs["codebook"], inputs["weight"])
    want = plan_projection(inputs["hidden"] @ inputs["head"].T, inputs["codebook"], inputs["weight"])
    assert_close("projected", got.projected, want.projected, 1e-12)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_only_planning_selections_reach_the_planner(selection: str) -> None:
    inputs, options = projection_inputs(), projection_options(selection)
    projected = plan_projection(**inputs, **options).projected
    gradient = gradients([projected], {"logits": inputs["logits"]})["logits"]
    assert bool(gradient.any()) == (selection in PLANNING)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_no_sentences(selection: str) -> None:
    inputs, options = projection_inputs(0), projection_options(selection, "rows", 0)
    result, found = run(plan_projection, inputs, options)
    assert [tuple(value.shape) for value in result] == [(0, 4), (0,), (0,)]
    for name, gradient in found.items():
        assert not gradient.any(), name


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_order_of_the_actions_does_not_matter(selection: str) -> None:
    if selection == "fixed":
        pytest.skip("fixed is the action in row 0, whichever that is")
    inputs, options = projection_inputs(), projection_options(selection, "number")
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    shuffled = {**inputs, "logits": inputs["logits"][:, order], "codebook": inputs["codebook"][order]}
    moved_to = order.argsort()
    shuffled_options = {**options, "oracle": torch.where(options["oracle"] >= 0, moved_to[options["oracle"]], -1)}
    if "noise" in options:
        shuffled_options["noise"] = options["noise"][:, order]
    want, got = plan_projection(**inputs, **options), plan_projection(**shuffled, **shuffled_options)
    for name, value, expected in zip(got._fields, got, want, strict=True):
        assert_close(name, value, expected, 1e-12)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_one_action_leaves_no_choice(selection: str) -> None:
    inputs = projection_inputs(num_actions=1)
    result = plan_projection(**inputs, **projection_options(selection, num_actions=1))
    only = inputs["codebook"][0] @ inputs["weight"].T + inputs["bias"]
    assert_close("projected", result.projected, only.expand(5, -1), 1e-12)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_full_oracle_weight_is_the_oracle_bit_for_bit(selection: str) -> None:
    inputs, options = projection_inputs(), projection_options(selection)
    oracle = torch.tensor([0, 6, 3, 3, 1])
    want = plan_projection(**inputs, selection="oracle", oracle=oracle).projected
    for weight in (1.0, torch.ones(5)):
        got = plan_projection(**inputs, **{**options, "oracle": oracle, "oracle_weight": weight}).projected
        assert torch.equal(got, want)


def test_shares_per_row_mix_row_by_row() -> None:
    inputs, oracle = projection_inputs(), torch.tensor([0, 6, 3, -1, 1])
    weights = torch.tensor([0.0, 1.0, 0.25, 1.0, 0.0], dtype=torch.float64)
    got = plan_projection(**inputs, oracle=oracle, oracle_weight=weights).projected
    soft = plan_projection(**inputs).projected
    hit = plan_projection(**inputs, selection="oracle", oracle=oracle.clamp(min=0)).projected
    want = torch.stack([soft[0], hit[1], 0.75 * soft[2] + 0.25 * hit[2], soft[3], soft[4]])
    assert_close("projected", got, want, 1e-12)


def test_limits_of_the_options() -> None:
    inputs = projection_inputs()
    soft, hard, uniform = (plan_projection(**inputs, selection=name).projected for name in ("soft", "hard", "uniform"))
    assert_close("top_k=K", plan_projection(**inputs, selection="top-k", top_k=7).projected, soft, 1e-12)
    assert_close("top_k=1", plan_projection(**inputs, selection="top-k", top_k=1).projected, hard, 1e-12)
    assert_close("cold", plan_projection(**inputs, temperature=1e-4).projected, hard, 1e-12)
    assert_close("hot", plan_projection(**inputs, temperature=1e9).projected, uniform, 1e-8)
    silent = torch.zeros(5, 7)
    assert torch.equal(plan_projection(**inputs, selection="gumbel", noise=silent).projected, soft)
    assert torch.equal(plan_projection(**inputs, selection="gumbel").projected, soft)
    assert torch.equal(plan_projection(**inputs, selection="gumbel-hard").projected, hard)


def test_oracle_nll_knows_neither_temperature_nor_noise() -> None:
    inputs, options = projection_inputs(), projection_options("gumbel", "labelled", temperature=3.0)
    nll = plan_projection(**inputs, **options).oracle_nll
    want = torch.nn.functional.cross_entropy(inputs["logits"], options["oracle"], ignore_index=-1, reduction="none")
    assert_close("oracle_nll", nll, want, 1e-12)


@pytest.mark.parametrize("selection", ["hard", "straight-through", "gumbel-hard", "top-k"])
def test_the_lowest_index_wins_a_tie(selection: str) -> None:
    inputs = projection_inputs(2, 6)
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0, 0.0], [1.0] * 6], dtype=torch.float64)
    options = {"selection": selection, **({"top_k": 1} if selection == "top-k" else {})}
    # Dividing by a large temperature must not make new ties: 2 and the next number above it stay apart.
    logits[0, 4] = torch.nextafter(logits[0, 4], torch.tensor(3.0, dtype=torch.float64))
    for rows, best in ((logits, [4, 0]), (logits.round(), [1, 0])):
        for temperature in (1.0, 1e3):
            got = plan_projection(**{**inputs, "logits": rows}, **options, temperature=temperature).projected
            want = inputs["codebook"][best] @ inputs["weight"].T + inputs["bias"]
            assert_close("projected", got, want, 1e-12)


def test_top_k_keeps_the_lower_of_equal_actions() -> None:
    inputs = projection_inputs(1, 5)
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 2.0]], dtype=torch.float64)
    got = plan_projection(**{**inputs, "logits": logits}, selection="top-k", top_k=3)
    probabilities = logits[0, [1, 4, 0]].softmax(dim=0)
    want = probabilities @ inputs["codebook"][[1, 4, 0]] @ inputs["weight"].T + inputs["bias"]
    assert_close("projected", got.projected[0], want, 1e-12)
    assert_close("log_normalizer", got.log_normalizer[0], logits[0, [1, 4, 0]].logsumexp(dim=0), 1e-12)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_rows_without_a_label_are_untouched(selection: str, labelled: bool) -> None:
    if selection == "oracle":
        pytest.skip("oracle needs a label in every row")
    inputs, options = projection_inputs(), projection_options(selection)
    plain = plan_projection(**inputs, **options)
    oracle = torch.tensor([-1, 2, -100, 0, -1]) if labelled else torch.full((5,), -1)
    mixed = plan_projection(**inputs, **options, oracle=oracle, oracle_weight=0.5)
    without = oracle < 0
    assert torch.equal(mixed.projected[without], plain.projected[without])
    assert not mixed.oracle_nll[without].any()
    gradient = gradients([mixed.oracle_nll], {"logits": inputs["logits"]})["logits"]
    assert not gradient[without].any()
    assert bool(gradient.any()) == labelled


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("kind", ["random signs", "one-hot", "all equal"])
def test_extreme_logits(kind: str, selection: str, mixing: str) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = {
        "random signs": 1e4 * (torch.randint(2, (5, 7), generator=generator) * 2.0 - 1),
        "one-hot": 1e4 * torch.eye(7)[[3, 0, 6, 3, 1]],
        "all equal": torch.full((5, 7), -1e4),
    }[kind]
    inputs = {**projection_inputs(dtype=torch.float32), "logits": logits.requires_grad_()}
    options = projection_options(selection, mixing, dtype=torch.float32)
    got = plan_projection(**inputs, **options)
    exact_inputs, exact_options = in_float64(inputs), in_float64(options)
    # Adding noise to 1e4 rounds in float32 by 1e-3, which is the sum's own error and none of the operation's.
    if "noise" in exact_options:
        summed = (inputs["logits"] + options["noise"]).detach().double()
        exact_options["noise"] = (summed - exact_inputs["logits"].detach()).requires_grad_()
    want = plan_projection_loop(**exact_inputs, **exact_options)
    wanted, exact = leaves(inputs, options), leaves(exact_inputs, exact_options)
    if selection in STEPPED:
        del exact["logits"], wanted["logits"]
        exact.pop("noise", None)
        wanted.pop("noise", None)
    assert_same((got, gradients(got, wanted)), (want, gradients(want, exact)), 1e-5)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_strides_do_not_matter(selection: str) -> None:
    inputs, options = projection_inputs(), projection_options(selection, "rows")
    strided = {
        "logits": inputs["logits"].detach().T.contiguous().T.requires_grad_(),
        "codebook": torch.zeros(14, 6, dtype=torch.float64)[::2, ::2].copy_(inputs["codebook"].detach()),
        "weight": torch.cat([inputs["weight"].detach()] * 2, dim=1)[:, :3],
        "bias": torch.stack([inputs["bias"].detach()] * 2, dim=1)[:, 1],
    }
    assert not any(value.is_contiguous() for value in strided.values())
    strided = {name: value.requires_grad_() for name, value in strided.items()}
    strided_options = dict(options)
    for name in ("noise", "oracle_weight", "oracle"):
        if name in options:
            doubled = torch.stack([options[name].detach()] * 2, dim=-1)[..., 0]
            assert not doubled.is_contiguous()
            strided_options[name] = doubled.requires_grad_(options[name].requires_grad)
    assert_same(run(plan_projection, strided, strided_options), run(plan_projection, inputs, options), 1e-12)


def test_broadcast_inputs() -> None:
    inputs = projection_inputs()
    row = inputs["logits"].detach()[:1].requires_grad_()
    got = plan_projection(**{**inputs, "logits": row.expand(5, 7)})
    want = plan_projection(**{**inputs, "logits": row.repeat(5, 1)})
    assert_close("projected", got.projected, want.projected, 1e-12)
    assert_close("gradient", gradients(got, {"row": row})["row"], gradients(want, {"row": row})["row"], 1e-12)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_any_input_may_be_without_gradient(selection: str) -> None:
    inputs, options = projection_inputs(), projection_options(selection, "rows")
    everything = leaves(inputs, options)
    whole = gradients(plan_projection(**inputs, **options), everything)
    for size in range(len(everything)):
        for chosen in itertools.combinations(everything, size):
            inputs_now, options_now = (
                {name: value.detach() if name in everything else value for name, value in group.items()}
                for group in (inputs, options)
            )
            some = {name: everything[name].detach().requires_grad_() for name in chosen}
            inputs_now.update((name, some[name]) for name in chosen if name in inputs)
            options_now.update((name, some[name]) for name in chosen if name in options)
            outputs = plan_projection(**inputs_now, **options_now)
            if not any(out.requires_grad for out in outputs):
                continue
            for name, gradient in gradients(outputs, some).items():
                assert_close(f"gradient of {name} beside {chosen}", gradient, whole[name], 1e-12)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_same_bits_every_time(selection: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        runs = []
        for _ in range(3):
            inputs = projection_inputs(257, 129, 65, 130, dtype=torch.float32)
            options = projection_options(selection, "rows", 257, 129, dtype=torch.float32)
            outputs, found = run(plan_projection, inputs, options)
            runs.append([*outputs, *found.values()])
    finally:
        torch.set_num_threads(threads)
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again, strict=True))


def test_upstream_gradients_are_random() -> None:
    first, second = upstream([torch.zeros(3, 4), torch.zeros(3)])
    assert first.std() > 0.1
    assert second.std() > 0.1
