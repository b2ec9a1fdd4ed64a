"""Choice of backend, the package's surface, and torch.compile."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import planlm.kernels
from planlm.kernels import add_plan, backend, cpp, plan_projection, plan_projection_from_hidden, use_backend

from .cases import SELECTIONS, gradients, hidden_inputs, leaves, projection_inputs, projection_options


def test_public_names() -> None:
    names = ["Documents", "PlanProjection", "StackedPlan", "add_plan", "cross_entropy_", "has_packed_attention"]
    names += ["packed_attention", "plan_projection", "plan_projection_from_hidden", "say_masked", "use_backend"]
    names += ["varlen_attention", "varlen_documents"]
    assert planlm.kernels.__all__ == names


def test_import_needs_no_triton() -> None:
    script = "import sys, planlm.kernels; print('triton' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "False"


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "why_not", lambda: "there is no compiler")
    ones, ids = torch.ones(1, 2), torch.zeros(1, dtype=torch.int64)
    with use_backend("cpp"):
        with pytest.raises(ValueError, match="'cpp' was asked for, but there is no compiler; use 'reference'"):
            plan_projection(**projection_inputs())
        with pytest.raises(ValueError, match="there is no compiler"):
            plan_projection_from_hidden(**hidden_inputs())
        with pytest.raises(ValueError, match="there is no compiler"):
            add_plan(ones, ones, ids)
    plan_projection(**projection_inputs())
    with use_backend("triton"), pytest.raises(ValueError, match="plan_projection has no triton implementation in floa"):
        plan_projection(**projection_inputs(dtype=torch.float64))
    with use_backend("cpp"), pytest.raises(ValueError, match="add_plan on meta has no cpp implementation"):
        add_plan(ones.to("meta"), ones.to("meta"), ids.to("meta"))


def test_a_missing_backend_is_replaced_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = projection_inputs()
    with use_backend("reference"):
        want = plan_projection(**inputs)
    monkeypatch.setattr(cpp, "why_not", lambda: "there is no compiler")
    assert all(torch.equal(*pair) for pair in zip(plan_projection(**inputs), want, strict=True))


def test_a_gpu_without_triton_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "_triton_lacks", lambda *_: "Triton is not installed")
    backend._find_triton.cache_clear()
    for _ in range(3):
        assert backend.choose("add_plan", torch.device("cuda"), torch.float32) is None
    backend._find_triton.cache_clear()
    assert [record.message for record in caplog.records] == [
        "planlm.kernels: Triton is not installed; the eager reference runs instead"
    ]


def test_an_unknown_backend_is_refused_at_once() -> None:
    with (
        pytest.raises(ValueError, match="use_backend: got 'cuda', needs one of triton, cpp, reference"),
        use_backend("cuda"),
    ):
        pass


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = projection_inputs()
    monkeypatch.setenv("PLANLM_BACKEND", "triton")
    with pytest.raises(ValueError, match="'triton' was asked for"):
        plan_projection(**inputs)
    with use_backend("reference"):
        plan_projection(**inputs)
    monkeypatch.setenv("PLANLM_BACKEND", "fast")
    with pytest.raises(ValueError, match="PLANLM_BACKEND: got 'fast', needs one of"):
        plan_projection(**inputs)
    for usable in ("reference", ""):
        monkeypatch.setenv("PLANLM_BACKEND", usable)
        plan_projection(**inputs)


def test_blocks_nest_and_end_with_an_error() -> None:
    inputs = projection_inputs()
    with use_backend("triton"):
        with use_backend("reference"):
            plan_projection(**inputs)
        with pytest.raises(KeyError), use_backend("reference"):
            raise KeyError
        with pytest.raises(ValueError, match="'triton' was asked for"):
            plan_projection(**inputs)
    plan_projection(**inputs)


def test_blocks_of_two_threads_end_in_any_order() -> None:
    first, second = use_backend("reference"), use_backend("triton")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(ValueError, match="'triton' was asked for"):
        plan_projection(**projection_inputs())
    second.__exit__(None, None, None)
    plan_projection(**projection_inputs())


@pytest.mark.parametrize("selection", SELECTIONS)
def test_compiles_without_graph_breaks(selection: str) -> None:
    torch._dynamo.reset()
    inputs, options = hidden_inputs(dtype=torch.float32), projection_options(selection, "rows", dtype=torch.float32)
    states, ids = torch.randn(6, 4), torch.tensor([0, 0, -1, 1, 3, 4])

    def block() -> list[torch.Tensor]:
        logits = inputs["hidden"] @ inputs["head"].T
        rest = {name: inputs[name] for name in ("codebook", "weight", "bias")}
        first = plan_projection(logits, **rest, **options)
        second = plan_projection_from_hidden(**inputs, **options)
        planned = add_plan(states, first.projected, ids)
        return [*first, *second, add_plan(planned, second.projected, ids, inputs["bias"])]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    want, got = block(), compiled()
    assert all(torch.equal(value, expected) for value, expected in zip(got, want, strict=True))
    wanted = leaves(inputs, options)
    found, expected_gradients = gradients(got, wanted), gradients(want, wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], expected_gradients[name])


def test_compiled_code_follows_the_forced_backend() -> None:
    torch._dynamo.reset()
    inputs = projection_inputs()
    compiled = torch.compile(lambda: plan_projection(**inputs).projected, backend="eager")
    compiled()
    with use_backend("triton"), pytest.raises(ValueError, match="'triton' was asked for"):
        compiled()
    compiled()
