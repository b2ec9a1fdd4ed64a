"""The C++ operators: more than one tile, every instruction set, what they allocate and save, how they are built."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from planlm.kernels import add_plan, cpp, operators, plan_projection, plan_projection_from_hidden, use_backend

from .cases import (
    assert_close,
    gradients,
    hidden_inputs,
    in_float64,
    leaves,
    projection_inputs,
    projection_options,
    relative_error,
)
from .naive import plan_projection_eager

pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))

# More rows than a tile has (1024), which leaves 1024 actions to a tile: two tiles each way, the second ones ragged.
TILED = {"num_sentences": 1100, "num_actions": 2000}


@pytest.fixture(autouse=True)
def _cpp():
    with use_backend("cpp"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_bias_and_a_weight_of_any_strides(dtype: torch.dtype) -> None:
    """oneDNN's linear layer reads a bias as if its values were adjacent."""
    inputs = projection_inputs(5, 40, size=12, plan_size=24, dtype=dtype)
    bias, weight = torch.arange(48.0).to(dtype), inputs["weight"].detach()
    layouts = {
        "every second": bias[::2],
        "a column": bias.view(24, 2)[:, 1],
        "expanded": bias[3:4].expand(24),
    }
    for name, layout in layouts.items():
        for matrix in (weight, weight.t().contiguous().t(), torch.stack([weight, weight], dim=-1)[..., 0]):
            given = {**inputs, "bias": layout, "weight": matrix}
            usual = {**inputs, "bias": layout.clone(), "weight": weight}
            found, wanted = plan_projection(**given).projected, plan_projection(**usual).projected
            torch.testing.assert_close(found, wanted, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("selection", ["soft", "gumbel", "top-k"])
@pytest.mark.parametrize("function", [plan_projection, plan_projection_from_hidden], ids=lambda f: f.__name__)
def test_several_tiles(function, selection: str, dtype: torch.dtype) -> None:
    make = projection_inputs if function is plan_projection else hidden_inputs
    inputs = make(**TILED, dtype=dtype)
    options = projection_options(selection, "rows", **TILED, dtype=dtype)
    exact_inputs, exact_options = in_float64(inputs), in_float64(options)
    got = function(**inputs, **options)
    found = gradients(got, leaves(inputs, options))
    with use_backend("reference"):
        want = function(**exact_inputs, **exact_options)
        truths = gradients(want, leaves(exact_inputs, exact_options))
    values = dict(inputs)
    if function is plan_projection_from_hidden:
        states = (values.pop(name) for name in ("hidden", "head", "head_bias"))
        values = {"logits": torch.nn.functional.linear(*states), **values}
    usual = plan_projection_eager(**values, **options)
    eager = gradients(usual, leaves(inputs, options))
    for name, value, truth, theirs in zip(got._fields, got, want, usual, strict=True):
        if dtype == torch.float32:
            assert_close(name, value, truth, 1e-5)
        else:
            assert relative_error(value, truth) <= relative_error(theirs, truth) + 1e-3, name
    for name, truth in truths.items():
        if dtype == torch.float32:
            assert_close(f"gradient of {name}", found[name], truth, 1e-5)
        else:
            assert relative_error(found[name], truth) <= relative_error(eager[name], truth) + 1e-3, name


@pytest.mark.parametrize("function", [plan_projection, plan_projection_from_hidden], ids=lambda f: f.__name__)
def test_equal_scores_in_different_tiles_keep_the_first(function) -> None:
    if function is plan_projection:
        inputs = projection_inputs(**TILED, dtype=torch.float32)
        inputs["logits"] = torch.zeros_like(inputs["logits"]).requires_grad_()
    else:
        inputs = hidden_inputs(**TILED, dtype=torch.float32)
        inputs["head"] = torch.zeros_like(inputs["head"]).requires_grad_()
        inputs["head_bias"] = None
    for top_k, wanted in ((1, inputs["codebook"][0]), (1500, inputs["codebook"][:1500].mean(dim=0))):
        projected = function(**inputs, selection="top-k", top_k=top_k).projected
        want = (inputs["weight"] @ wanted + inputs["bias"]).expand(1100, -1)
        torch.testing.assert_close(projected, want)
    assert torch.equal(function(**inputs, selection="hard").projected, function(**inputs, selection="fixed").projected)


def test_actions_masked_with_minus_infinity_count_nothing() -> None:
    inputs = projection_inputs(**TILED)
    kept = inputs["logits"].detach().clone()
    kept[:, :1024] = -torch.inf  # a whole tile, the first
    masked = plan_projection(**{**inputs, "logits": kept})
    some = plan_projection(kept[:, 1024:], *(inputs["codebook"][1024:], inputs["weight"], inputs["bias"]))
    for name, got, want in zip(masked._fields, masked, some, strict=True):
        assert_close(name, got, want, 1e-12)
    kept[3] = -torch.inf
    kept[4, 1900] = torch.nan
    kept[5, 7] = torch.inf
    result = plan_projection(**{**inputs, "logits": kept})
    assert result.projected.isnan().any(dim=1).nonzero().flatten().tolist() == [3, 4, 5]
    with use_backend("reference"):
        assert plan_projection(**{**inputs, "logits": kept}).projected.isnan().equal(result.projected.isnan())


@pytest.mark.timeout(1200)  # the first time builds a library for the set
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability: str) -> None:
    script = """
import torch
from planlm.kernels import add_plan, cpp, plan_projection, use_backend
from tests.kernels.cases import *
from tests.kernels.naive import plan_projection_eager
for dtype in (torch.float32, torch.bfloat16):
    inputs = projection_inputs(65, 130, 33, 47, dtype=dtype)
    options = projection_options("gumbel", "rows", 65, 130, dtype=dtype)
    exact_inputs, exact_options = in_float64(inputs), in_float64(options)
    with use_backend("cpp"):
        got = plan_projection(**inputs, **options)
        found = gradients(got, leaves(inputs, options))
    with use_backend("reference"):
        want = plan_projection(**exact_inputs, **exact_options)
        truths = gradients(want, leaves(exact_inputs, exact_options))
    eager = plan_projection_eager(**inputs, **options)
    usual = gradients(eager, leaves(inputs, options))
    for name in truths:
        slack = 1e-5 if dtype == torch.float32 else relative_error(usual[name], truths[name]) + 1e-3
        assert_close(name, found[name], truths[name], slack)
    x, plan = torch.randn(9, 37, dtype=dtype), torch.randn(3, 37, dtype=dtype)
    ids = torch.tensor([-1, 0, 0, 1, -1, 1, 1, 2, 2])
    with use_backend("cpp"):
        ours = add_plan(x, plan, ids)
    with use_backend("reference"):
        assert torch.equal(ours, add_plan(x, plan, ids))
print(torch.backends.cpu.get_cpu_capability(), cpp.fast_bf16())
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [{"default": "DEFAULT", "avx2": "AVX2"}[capability], "False"]


def largest_allocation(run) -> int:
    """Bytes of the largest block that torch's allocator gives out while `run` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    return max(
        (event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"), default=0
    )


@pytest.mark.parametrize("selection", ["soft", "top-k", "straight-through", "hard"])
@pytest.mark.parametrize(
    ("num_sentences", "num_actions"), [(192, 1024), (600, 4096), (3, 20000), (40, 7)], ids=lambda n: str(n)
)
def test_logits_never_exist(num_sentences: int, num_actions: int, selection: str) -> None:
    sizes = {"num_sentences": num_sentences, "num_actions": num_actions}
    inputs = hidden_inputs(**sizes, state_size=2, size=1, plan_size=2, dtype=torch.float32)
    options = projection_options(selection, "rows", **sizes, dtype=torch.float32)
    if selection == "top-k":
        options["top_k"] = max(1, num_actions // 16)

    def forward_and_backward() -> None:
        gradients(plan_projection_from_hidden(**inputs, **options), leaves(inputs, options))

    bound = num_sentences * num_actions * 4
    # Not the logits' doing: the head and its gradient are [K, 2], and a straight-through codebook gradient is dense.
    assert bound > 2 * num_actions * 4 or num_sentences == 3
    assert largest_allocation(forward_and_backward) < bound


@pytest.mark.parametrize("function", [plan_projection, plan_projection_from_hidden], ids=lambda f: f.__name__)
def test_nothing_of_the_probabilities_is_saved(function) -> None:
    sizes = {"num_sentences": 96, "num_actions": 512}
    make = projection_inputs if function is plan_projection else hidden_inputs
    inputs = make(**sizes, dtype=torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        function(**inputs, **projection_options("soft", "rows", **sizes, dtype=torch.float32))
    given = {value.data_ptr() for value in inputs.values()}
    assert saved
    assert all(value.numel() < 96 * 512 for value in saved if value.data_ptr() not in given)


def test_addition_saves_nothing_of_the_tokens() -> None:
    x, plan = torch.randn(4096, 32, requires_grad=True), torch.randn(8, 32, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        add_plan(x, plan, torch.arange(8).repeat_interleave(512))
    assert all(value.numel() <= 4096 for value in saved)


def test_ids_are_read_at_every_call() -> None:
    ids = torch.zeros(8, dtype=torch.int64)
    x, plan = torch.randn(8, 16, requires_grad=True), torch.randn(2, 16, requires_grad=True)
    compiled = torch.compile(lambda: add_plan(x, plan, ids), fullgraph=True, backend="aot_eager")
    for run in (lambda: add_plan(x, plan, ids), compiled):
        ids.numpy()[:] = 0  # which the tensor's version does not show
        result = run()
        ids.numpy()[:] = [0, 1, 0, 1, 0, 1, 0, 1]
        with pytest.raises(ValueError, match=r"segment_ids: got 1 before 0, needs ids that never fall"):
            run()
        with pytest.raises(ValueError, match="segment_ids: got 1 before 0"):
            result.sum().backward()
        ids.numpy()[:] = 10**7
        with pytest.raises(ValueError, match=r"segment_ids: got ids from 10000000 to 10000000, needs .* below 2"):
            run()


def test_compiled_code_refuses_actions_out_of_range() -> None:
    inputs, oracle = projection_inputs(), torch.tensor([0, 1, 77, -1, 2])
    compiled = torch.compile(lambda: plan_projection(**inputs, oracle=oracle), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="oracle: got action 77, needs actions below 7"):
        compiled()


def test_sums_of_many_equal_values_are_exact_enough() -> None:
    inputs = projection_inputs(20000, 3, 2, 5, dtype=torch.float32)
    projected = plan_projection(**inputs).projected
    (bias,) = torch.autograd.grad(projected, inputs["bias"], torch.full_like(projected, 0.1))
    assert_close("gradient of bias", bias, torch.full((5,), 2000.0), 1e-6)
    plan = torch.zeros(1, 5, requires_grad=True)
    planned = add_plan(torch.zeros(20000, 5), plan, torch.zeros(20000, dtype=torch.int64))
    (summed,) = torch.autograd.grad(planned, plan, torch.full_like(planned, 0.1))
    assert_close("gradient of plan", summed, torch.full((1, 5), 2000.0), 1e-6)


def test_dtypes_that_have_no_loops_are_converted() -> None:
    inputs, options = projection_inputs(), projection_options("gumbel", "rows")
    options["noise"] = options["noise"].detach().half()
    found = plan_projection(**inputs, **options)
    want = plan_projection(**inputs, **{**options, "noise": options["noise"].double()})
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))


@pytest.mark.parametrize("forbidden", ["AVX2", "AVX512_CORE"])
def test_a_onednn_that_may_not_multiply_bf16_is_replaced(forbidden: str) -> None:
    script = """
import torch
from planlm.kernels import plan_projection
result = plan_projection(torch.zeros(4, 8).bfloat16(), torch.ones(8, 6).bfloat16(), torch.ones(2, 6).bfloat16())
assert result.projected.eq(6).all()
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": forbidden}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.mark.parametrize("kind", ["logits", "hidden", "statistics", "transposed"])
def test_opcheck_projection(kind: str) -> None:
    hidden = hidden_inputs(dtype=torch.float32)
    options = projection_options("gumbel", "rows", dtype=torch.float32)
    logits = projection_inputs(dtype=torch.float32)["logits"]
    source, head, head_bias = (logits, None, None) if kind != "hidden" else tuple(hidden.values())[:3]
    codebook, weight, bias = hidden["codebook"], hidden["weight"], hidden["bias"]
    if kind == "statistics":
        codebook = weight = bias = None
    if kind == "transposed":
        source, codebook, weight = (
            value.detach().t().contiguous().t().requires_grad_() for value in (source, codebook, weight)
        )
    share = None if kind == "statistics" else options["oracle_weight"]
    torch.library.opcheck(
        torch.ops.planlm.plan_projection.default,
        (source, head, head_bias, codebook, weight, bias, options["noise"], options["oracle"], share, 0.7, 3, True),
    )


@pytest.mark.parametrize("gated", [True, False])
def test_opcheck_addition(gated: bool) -> None:
    x, plan = torch.randn(6, 4, requires_grad=True), torch.randn(3, 8, requires_grad=True)[:, 2:6]
    gate = torch.randn(4, requires_grad=True) if gated else None
    torch.library.opcheck(torch.ops.planlm.add_plan.default, (x, plan, torch.tensor([0, -1, 0, 1, 2, 2]), gate))


@pytest.mark.parametrize("wanted", list(itertools.combinations(["logits", "codebook", "weight", "bias"], 2)), ids=str)
def test_some_gradients_are_those_of_all(wanted: tuple[str, str]) -> None:
    everything = projection_inputs(9, 70, 5, 6)
    options = projection_options("soft", "number", 9, 70)
    want = gradients(plan_projection(**everything, **options), everything)
    some = {name: value.detach().requires_grad_(name in wanted) for name, value in everything.items()}
    found = gradients(plan_projection(**some, **options), leaves(some, {}))
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], want[name]) for name in wanted)


def test_repeats_bit_for_bit() -> None:
    inputs = projection_inputs(**TILED, dtype=torch.float32)
    options = projection_options("gumbel", "rows", **TILED, dtype=torch.float32)
    runs = []
    for _ in range(3):
        got = plan_projection(**inputs, **options)
        runs.append([*got, *gradients(got, leaves(inputs, options)).values()])
    assert all(torch.equal(value, first) for run in runs[1:] for value, first in zip(run, runs[0], strict=True))


SMALL = """
#include <torch/library.h>
TORCH_LIBRARY_IMPL(planlm, CPU, library) {
  using at::Tensor;
  library.impl("add_plan", [](const Tensor& x, const Tensor&, const Tensor&, const std::optional<Tensor>&) {
    return x.clone();
  });
}
"""
BUILD = """
import sys, pathlib
from planlm.kernels import cpp
cpp.SOURCES = pathlib.Path(sys.argv[1])
print(cpp.why_not())
"""


def build(sources: Path, cache: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that loads the operators of `sources`, as the first use does."""
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(sources)],
        env={**os.environ, "PLANLM_CACHE": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Sources that compile in seconds."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "small.cpp").write_text(SMALL)
    return folder


def test_processes_that_build_at_once_share_one_library(small: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    processes = [build(small, cache) for _ in range(3)]
    outputs = [process.communicate() for process in processes]
    assert [out for out, _ in outputs] == ["None\n"] * 3, outputs
    assert sum("compiling the C++ operators" in err for _, err in outputs) == 1
    (library,) = (cache / "operators").glob("*.so")
    library.write_bytes(library.read_bytes()[:1000])  # as a power cut may leave it
    out, err = build(small, cache).communicate()
    assert out == "None\n", err
    assert {path.suffix for path in (cache / "operators").iterdir()} == {".so", ".sha256", ""}


def test_a_killed_build_is_begun_anew(small: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = build(small, cache)
    assert process.stderr is not None
    assert "compiling" in process.stderr.readline()
    process.kill()
    process.communicate()
    out, err = build(small, cache).communicate()
    assert out == "None\n", err
    assert not list((cache / "operators").glob("build-*")), "what the killed build left is taken away"


@pytest.mark.parametrize(
    ("source", "environment", "reason"),
    [
        (SMALL, {"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler) for the C++ operators: install g++"),
        ("#error it does not fit", {}, "the C++ operators do not compile ("),
        (None, {}, "the C++ sources are not in"),
    ],
    ids=["no compiler", "error", "no sources"],
)
def test_what_cannot_be_built_is_said_in_one_line(
    small: Path, tmp_path: Path, source: str | None, environment: dict[str, str], reason: str
) -> None:
    if source is None:
        (small / "small.cpp").unlink()
    else:
        (small / "small.cpp").write_text(source)
    out, err = build(small, tmp_path / "cache", **environment).communicate()
    assert out.startswith(reason), out
    lines = [line for line in err.splitlines() if "compiling the" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith(f"planlm.kernels: {reason}")
    assert lines[0].endswith("; the eager reference runs instead")


def test_a_cache_that_is_a_file_is_said_in_one_line(small: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    out, err = build(small, tmp_path / "cache").communicate()
    assert out.startswith("the C++ operators cannot be kept in"), out
    assert err.count("\n") == 1
    assert "set PLANLM_CACHE" in err


def test_schemas_are_those_of_the_operators() -> None:
    for schema in operators.SCHEMAS:
        name = schema.split("(")[0]
        assert str(getattr(torch.ops.planlm, name).default._schema).startswith(f"planlm::{name}(")
