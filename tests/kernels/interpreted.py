"""The Triton kernels in Triton's interpreter: values and every gradient against the reference in float64.

Tiles are 16 by 16 there, so that tensors of 20 to 70 rows have several in every dimension. What tensor cores round and
what the compiler makes of the kernels, benchmarks/compile_report and a GPU have to show. Run by test_triton.py, or with

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from planlm.kernels import (
    PlanProjection,
    plan_projection,
    plan_projection_from_hidden,
    projection,
    triton_addition,
    triton_launch,
    triton_projection,
    use_backend,
)
from planlm.kernels.operators import ProjectionInputs, ProjectionNeeds, ProjectionOutputs, Statistic

from .cases import (
    HALVES,
    assert_close,
    assert_same,
    gradients,
    hidden_inputs,
    leaves,
    projection_inputs,
    projection_options,
    relative_error,
    seeded,
    truth,
    upstream,
)
from .conftest import operators
from .naive import eager_from_hidden, plan_projection_eager

SPLIT = (5, 70, 17, 20)
"""S, K, A and D for which the actions are split over programs."""
TILED = (20, 40, 33, 18)
"""At least two tiles in every dimension."""
SHAPES = [(1, 1, 1, 1), (5, 7, 3, 4), (16, 32, 16, 16), SPLIT, TILED]


@pytest.fixture(params=[False, True], ids=["composed", "streamed"], autouse=True)
def streamed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both forms, of everything."""
    monkeypatch.setattr(projection, "STREAMED_BYTES", 0 if request.param else 1 << 60)
    return request.param


def arguments(inputs: dict[str, Tensor], options: dict[str, Any]) -> ProjectionInputs:
    """The backend's arguments."""
    weight = options.get("oracle_weight")
    source = inputs["hidden"] if "hidden" in inputs else inputs["logits"]
    if isinstance(weight, float):
        weight = torch.full((len(source),), weight)
    defaults = {"temperature": 1.0, "top_k": 0}
    named = {**defaults, **inputs, **options, "source": source, "oracle_weight": weight}
    named["streamed"] = projection.STREAMED_BYTES == 0
    values = (named.get(name) for name in ProjectionInputs._fields)
    return ProjectionInputs(*(value.detach() if isinstance(value, Tensor) else value for value in values))


def backward(
    given: ProjectionInputs, outputs: ProjectionOutputs, ups: list[Tensor | None], *needed: str
) -> dict[str, Tensor]:
    """The backend's gradients by name; all of them unless some are named."""
    names = ProjectionNeeds._fields
    needs = [getattr(given, name) is not None and (not needed or name in needed) for name in names]
    found = triton_projection.plan_projection_backward(*ups, *given[:9], *outputs[3:], *given[9:], needs)
    assert all(gradient.numel() == 0 for gradient, need in zip(found, needs, strict=True) if not need)
    return {name: gradient for name, gradient, need in zip(names, found, needs, strict=True) if need}


def run(inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple[ProjectionOutputs, dict[str, Tensor]]:
    """Outputs and all gradients of the random upstream gradients of `cases.upstream`."""
    given = arguments(inputs, options)
    outputs = triton_projection.plan_projection(*given)
    return outputs, backward(given, outputs, upstream(outputs[:3]))


def exact(inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple[PlanProjection, dict[str, Tensor]]:
    """The same of the reference in float64, gradients by the backend's names."""
    outputs, found = truth(plan_projection_from_hidden if "hidden" in inputs else plan_projection, inputs, options)
    return outputs, {"source" if name in ("logits", "hidden") else name: value for name, value in found.items()}


def check(inputs: dict[str, Tensor], options: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Outputs and gradients within `tolerance` of the reference."""
    outputs, found = run(inputs, options)
    assert_same((outputs[:3], found), exact(inputs, options), tolerance)


@pytest.mark.parametrize("mixing", ["unlabelled", "rows"])
@pytest.mark.parametrize("selection", ["soft", "gumbel", "top-k"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(shape: tuple[int, ...], selection: str, mixing: str) -> None:
    inputs = projection_inputs(*shape, dtype=torch.float32)
    check(inputs, projection_options(selection, mixing, *shape[:2], dtype=torch.float32))


@pytest.mark.parametrize("selection", ["soft", "gumbel", "top-k"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), SPLIT, (20, 40, 17, 18)], ids=str)
def test_agrees_with_the_reference_from_hidden(shape: tuple[int, ...], selection: str) -> None:
    inputs = hidden_inputs(*shape[:2], 6, *shape[2:], dtype=torch.float32)
    check(inputs, projection_options(selection, "rows", *shape[:2], dtype=torch.float32))


@pytest.mark.parametrize("selection", ["soft", "gumbel"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_no_worse_than_eager(dtype: torch.dtype, selection: str) -> None:
    inputs = projection_inputs(*TILED, dtype=dtype)
    options = projection_options(selection, "rows", *TILED[:2], dtype=dtype)
    outputs, found = run(inputs, options)
    want, wanted = exact(inputs, options)
    eager = plan_projection_eager(**inputs, **options)
    for name, got, usual, value in zip(want._fields, outputs, eager, want, strict=False):
        assert relative_error(got, value) <= relative_error(usual, value) + 1e-3, name
    usual = gradients(eager, leaves(inputs, options))
    usual["source"] = usual.pop("logits")
    for name, value in wanted.items():
        assert found[name].dtype == dtype
        assert relative_error(found[name], value) <= relative_error(usual[name], value) + 1e-3, f"gradient of {name}"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_from_hidden(dtype: torch.dtype) -> None:
    inputs = hidden_inputs(9, 70, 24, 17, 20, dtype=dtype)
    options = projection_options("soft", "rows", 9, 70, dtype=dtype)
    outputs, found = run(inputs, options)
    want, wanted = exact(inputs, options)
    for name, got, value in zip(("log_normalizer", "oracle_nll"), outputs[1:3], want[1:], strict=True):
        assert_close(name, got, value, 1e-5)  # the logits are never rounded
    usual = gradients(eager_from_hidden(**inputs, **options), leaves(inputs, options))
    usual["source"] = usual.pop("hidden")
    for name, value in wanted.items():
        assert relative_error(found[name], value) <= relative_error(usual[name], value) + 1e-3, f"gradient of {name}"


def test_small_probabilities_in_float16() -> None:
    # 6e-6 each: a tenth of float16's smallest normal number.
    inputs = projection_inputs(2, 64, 3, 2, dtype=torch.float16)
    inputs["logits"] = torch.full((2, 64), -12.0, dtype=torch.float16).index_fill(1, torch.tensor([0]), 0.0)
    inputs["weight"] = (100 * inputs["weight"].detach()).requires_grad_()
    options = {"temperature": 1.0, "selection": "soft"}
    found, wanted = run(inputs, options)[1], exact(inputs, options)[1]
    assert_close("gradient of codebook", found["codebook"][1:], wanted["codebook"][1:], 2e-3)


@pytest.mark.parametrize("kind", ["random signs", "one-hot", "all equal"])
@pytest.mark.parametrize("selection", ["soft", "top-k"])
def test_extreme_logits(kind: str, selection: str) -> None:
    num_sentences, num_actions, *_ = SPLIT
    signs = torch.randint(2, (num_sentences, num_actions), generator=seeded(5)) * 2.0 - 1
    logits = {
        "random signs": 1e4 * signs,
        "one-hot": 1e4 * torch.eye(num_actions)[[3, 0, 69, 3, 41]],
        "all equal": torch.full((num_sentences, num_actions), -1e4),
    }[kind]
    inputs = {**projection_inputs(*SPLIT, dtype=torch.float32), "logits": logits.requires_grad_()}
    check(inputs, projection_options(selection, "rows", num_sentences, num_actions, dtype=torch.float32))


def test_top_k_keeps_the_lower_of_equal_actions_across_chunks() -> None:
    inputs = hidden_inputs(5, 70, 6, 17, 20, dtype=torch.float32)
    with torch.no_grad():
        inputs["head"][1::2] = inputs["head"][0]
        inputs["head_bias"][1::2] = inputs["head_bias"][0]
    options = {"temperature": 0.7, "selection": "top-k", "top_k": 40}
    # Equal rows have equal products in every precision, so the ties are the reference's too.
    check(inputs, options)
    outputs = triton_projection.plan_projection(*arguments(inputs, options))
    logits = inputs["hidden"] @ inputs["head"].T + inputs["head_bias"]
    assert torch.equal(outputs.tie_index, logits.argsort(dim=1, descending=True, stable=True)[:, 39])


def test_masked_logits() -> None:
    inputs = projection_inputs(*SPLIT, dtype=torch.float32)
    with torch.no_grad():
        inputs["logits"][:, 5:] = -torch.inf
    check(inputs, {"temperature": 0.7, "selection": "soft", "oracle": torch.tensor([0, 1, -1, 4, 2])})


def test_rows_without_an_oracle_action() -> None:
    inputs, options = projection_inputs(*TILED, dtype=torch.float32), projection_options("soft", "rows", *TILED[:2])
    options["oracle"] = torch.full((20,), -7)
    options["oracle_weight"] = options["oracle_weight"].detach().float().requires_grad_()
    check(inputs, options)
    outputs, found = run(inputs, options)
    assert not outputs.oracle_nll.any()
    assert not found["oracle_weight"].any()


def test_statistics() -> None:
    inputs = projection_inputs(*SPLIT, dtype=torch.float32)
    options = projection_options("gumbel", "labelled", *SPLIT[:2], dtype=torch.float32)
    *_, best, mixture, statistics, tie_index = triton_projection.plan_projection(*arguments(inputs, options))
    logits, actions = inputs["logits"].detach(), inputs["codebook"].detach()
    scores = logits + options["noise"].detach()
    assert torch.equal(best, scores.argmax(1))
    assert_close("mixture", mixture, (scores / 0.7).softmax(1) @ actions, 1e-5)
    score_max, logit_max = scores.amax(1), logits.amax(1)
    assert torch.equal(statistics[Statistic.SCORE_MAX], score_max)
    assert torch.equal(statistics[Statistic.LOGIT_MAX], logit_max)
    for row, log_sum in (
        (Statistic.SCORE_LOG_SUM, ((scores - score_max[:, None]) / 0.7).logsumexp(1)),
        (Statistic.LOGIT_LOG_SUM, (logits - logit_max[:, None]).logsumexp(1)),
    ):
        assert_close(row.name, statistics[row], log_sum, 1e-5)
    assert bool((statistics[Statistic.THRESHOLD] == -torch.inf).all())
    assert bool((tie_index == 69).all())


def test_the_lowest_of_equal_actions_is_best() -> None:
    inputs = projection_inputs(*SPLIT, dtype=torch.float32)
    logits = torch.zeros(5, 70)
    logits[1, [33, 40, 69]] = 2.0
    best = triton_projection.plan_projection(*arguments({**inputs, "logits": logits}, {})).best
    assert best.tolist() == [0, 33, 0, 0, 0]


def test_statistics_alone() -> None:
    inputs = projection_inputs(*TILED, dtype=torch.float32)
    options = projection_options("soft", "labelled", *TILED[:2], dtype=torch.float32)
    whole = run(inputs, options)[0]
    given = arguments(inputs, options)._replace(codebook=None, weight=None, bias=None)
    outputs = triton_projection.plan_projection(*given)
    assert outputs.projected.shape == outputs.mixture.shape == (20, 0)
    for got, want in zip((*outputs[1:4], outputs[5][:4]), (*whole[1:4], whole[5][:4]), strict=True):
        assert_close("statistics", got.float(), want.float(), 1e-6)
    with use_backend("reference"):
        wanted = gradients(plan_projection(**inputs, **options)[1:], {"logits": inputs["logits"]})
    found = backward(given, outputs, [None, *upstream(outputs[1:3])])
    assert_close("gradient", found["source"], wanted["logits"], 1e-5)


def test_associated_the_other_way() -> None:
    inputs = projection_inputs(*TILED, dtype=torch.float32)
    options = projection_options("soft", "rows", *TILED[:2], dtype=torch.float32)
    outputs, found = run(inputs, options)
    with torch.no_grad():
        projected = inputs["codebook"] @ inputs["weight"].T
    given = arguments(inputs, options)._replace(codebook=projected, weight=None)
    others = triton_projection.plan_projection(*given)
    assert_close("projected", others[0], outputs[0], 1e-5)
    again = backward(given, others, upstream(others[:3]))
    for name in ("source", "bias", "oracle_weight"):
        assert_close(f"gradient of {name}", again[name], found[name], 1e-5)
    with torch.no_grad():
        assert_close("gradient of codebook", again["codebook"] @ inputs["weight"], found["codebook"], 1e-5)


@pytest.mark.parametrize("from_hidden", [False, True], ids=["logits", "hidden"])
def test_no_sentence(from_hidden: bool) -> None:
    make = hidden_inputs if from_hidden else projection_inputs
    inputs = make(0, 7, dtype=torch.float32)
    outputs, found = run(inputs, projection_options("gumbel", "rows", 0, 7, dtype=torch.float32))
    assert outputs[0].shape == (0, 4)
    for name, gradient in found.items():
        assert not gradient.any(), name


def test_each_gradient_alone_is_the_same() -> None:
    inputs = hidden_inputs(*SPLIT[:2], 6, *SPLIT[2:], dtype=torch.float32)
    options = projection_options("gumbel", "rows", *SPLIT[:2], dtype=torch.float32)
    given = arguments(inputs, options)
    outputs = triton_projection.plan_projection(*given)
    whole = backward(given, outputs, upstream(outputs[:3]))
    for name, want in whole.items():
        got = backward(given, outputs, upstream(outputs[:3]), name)
        assert torch.equal(got[name], want), name


@pytest.mark.parametrize("present", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_outputs_without_a_gradient(present: tuple[int, ...]) -> None:
    inputs = projection_inputs(*SPLIT, dtype=torch.float32)
    options = projection_options("gumbel", "rows", *SPLIT[:2], dtype=torch.float32)
    given = arguments(inputs, options)
    outputs = triton_projection.plan_projection(*given)
    ups = [up if index in present else None for index, up in enumerate(upstream(outputs[:3]))]
    zeros = [up if index in present else 0 * up for index, up in enumerate(upstream(outputs[:3]))]
    want = backward(given, outputs, zeros)
    for name, got in backward(given, outputs, ups).items():
        assert_close(f"gradient of {name}", got, want[name], 1e-6)


def test_strides_do_not_matter() -> None:
    inputs = projection_inputs(*SPLIT, dtype=torch.float32)
    options = projection_options("gumbel", "rows", *SPLIT[:2], dtype=torch.float32)
    outputs, found = run(inputs, options)
    strided = {
        "logits": torch.cat([inputs["logits"].detach()] * 2, dim=1)[:, :70],
        "codebook": inputs["codebook"].detach().T.contiguous().T,
        "weight": torch.zeros(40, 34)[::2, ::2].copy_(inputs["weight"].detach()),
        "bias": torch.stack([inputs["bias"].detach()] * 2, dim=1)[:, 1],
    }
    strided_options = dict(options)
    for name in ("noise", "oracle_weight", "oracle"):
        strided_options[name] = torch.stack([options[name].detach()] * 2, dim=-1)[..., 0]
    others, again = run(strided, strided_options)
    for got, want in zip(others, outputs, strict=True):
        assert torch.equal(got, want)
    for name, want in found.items():
        assert torch.equal(again[name], want), name
    given = arguments(inputs, options)
    one = torch.ones(())  # what `.sum().backward()` sends
    expanded = backward(given, outputs, [one.expand(5, 20), one.expand(5), one.expand(5)])
    full = backward(given, outputs, [torch.ones(5, 20), torch.ones(5), torch.ones(5)])
    for name, want in full.items():
        assert torch.equal(expanded[name], want), name


def test_the_same_bits_every_time() -> None:
    inputs = projection_inputs(*SPLIT, dtype=torch.float32)
    options = projection_options("soft", "rows", *SPLIT[:2], dtype=torch.float32)
    (first, found), (second, again) = run(inputs, options), run(inputs, options)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("kind", ["logits", "hidden", "associated"])
def test_opcheck(kind: str, streamed: bool) -> None:
    make = hidden_inputs if kind == "hidden" else projection_inputs
    inputs = make(dtype=torch.float32)
    options = projection_options("gumbel", "rows", dtype=torch.float32)
    with use_backend("triton"):
        got = plan_projection(**projection_inputs(dtype=torch.float32), **options)  # defines the operators
    assert got.projected.shape == (5, 4)
    source, head, head_bias = (*inputs.values(),)[:3] if kind == "hidden" else (inputs["logits"], None, None)
    codebook, weight, bias = inputs["codebook"], inputs["weight"], inputs["bias"]
    if kind == "associated":
        codebook, weight = torch.randn(7, 4, requires_grad=True), None
    torch.library.opcheck(
        operators().plan_projection.default,
        (source, head, head_bias, codebook, weight, bias, options["noise"],
         options["oracle"], options["oracle_weight"], 0.7, 3, streamed),
    )  # fmt: skip


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, less the interpreter's copies of whole storages."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.dtype != torch.uint8:
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("selection", ["soft", "top-k"])
@pytest.mark.parametrize("streamed", [True], indirect=True, ids=["streamed"])
def test_from_hidden_allocates_nothing_of_the_logits_size(selection: str) -> None:
    num_sentences, num_actions = 16, 520
    inputs = hidden_inputs(num_sentences, num_actions, 2, 2, 2, dtype=torch.float32)
    options = projection_options(selection, "rows", num_sentences, num_actions, dtype=torch.float32)
    if selection == "top-k":
        options["top_k"] = 9
    with _Largest() as largest:
        run(inputs, options)
    assert largest.elements < num_sentences * num_actions // 3


LAUNCHES = {
    "composed": ["softmax_fwd_kernel", "softmax_bwd_kernel"],
    "streamed": [
        "mixture_fwd_kernel", "combine_fwd_kernel", "sentences_bwd_kernel", "logits_bwd_kernel", "codebook_bwd_kernel",
    ],
}  # fmt: skip


def test_launches(streamed: bool) -> None:
    seen: list[str] = []

    def note(request: triton_launch.Launch) -> bool:
        assert request.writes
        seen.append(request.kernel.fn.__name__)
        return False

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    for architecture in triton_launch.ARCHITECTURES:
        seen.clear()
        ids = torch.empty(4096, dtype=torch.int64, device="meta")
        matrices = {"logits": empty(4096, 1024), "codebook": empty(1024, 768), "weight": empty(768, 768)}
        given = arguments({**matrices, "bias": empty(768)}, {})
        with triton_launch.observed(note, architecture):
            outputs = triton_projection.plan_projection(*given)
            backward(given, outputs, [outputs.projected, None, None])
            triton_addition.add_plan(empty(4096, 768), outputs.projected, ids, None)
            bounds = torch.empty(4097, dtype=torch.int32, device="meta")
            triton_addition.sum_segments(empty(4096, 768), ids, bounds, None, empty(4096, 768), None)
        assert seen == [*LAUNCHES["streamed" if streamed else "composed"], "add_plan_fwd_kernel", "add_plan_bwd_kernel"]


def test_the_fastest_is_measured_once_for_a_class_of_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow, fast = triton_launch.Tiles(64, 64, 32), triton_launch.Tiles(128, 64, 32)
    trials: list[triton_launch.Tiles] = []

    def measure(trial: Any) -> float:
        trial()
        return -trials[-1].rows

    def forget() -> None:
        triton_launch._winners.cache_clear()
        triton_launch._found.clear()

    def choose(*sizes: int) -> triton_launch.Tiles:
        return triton_launch.fastest("mixture_fwd", sizes, torch.zeros(3), (slow, fast), trials.append)

    monkeypatch.setenv("PLANLM_CACHE", str(tmp_path))
    monkeypatch.setattr(triton_launch, "_has_choice", lambda _: False)
    assert choose(1000, 48) == slow and not trials, "without a device the rule's choice"
    monkeypatch.setattr(triton_launch, "_has_choice", lambda _: True)
    monkeypatch.setattr(triton_launch.triton.testing, "do_bench", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")
    (tmp_path / "fastest.json").write_text('{"damaged')
    forget()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(1000, 48) == slow, "nothing is measured into a graph"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose(1000, 48) == fast == choose(1000, 40)
    assert trials == [slow, fast]
    assert capsys.readouterr().err.count("\n") == 1
    forget()
    assert choose(1001, 33) == fast, "from the file"
    assert trials == [slow, fast]
    assert choose(1025, 33) == fast
    assert trials == [slow, fast] * 2
    forget()


def test_nothing_is_measured_without_a_device_or_where_the_user_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice:
        is_cuda = True

    assert triton_launch._has_choice(OnDevice())
    assert not triton_launch._has_choice(torch.zeros(1))
    monkeypatch.setenv("PLANLM_TUNE", "0")
    assert not triton_launch._has_choice(OnDevice())
