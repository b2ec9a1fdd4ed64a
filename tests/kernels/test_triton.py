"""The Triton kernels in Triton's interpreter, in a process that has `TRITON_INTERPRET` from its start, and on a GPU."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
ROOT = Path(__file__).parents[2]
RUNS = (
    ("interpreted.py", ""),
    ("interpreted_addition.py", ""),
    ("test_cross_entropy.py", "composed"),  # the loss has one form
    ("test_grid.py", "composed"),
    ("test_grid.py", "streamed"),
    ("test_likely.py", ""),
)
"""Files, and which of their tests."""


def failures(name: str, form: str, **variables: str) -> str:
    """What a process with these environment variables says of a file of tests; nothing where all of them pass."""
    test = str(Path(__file__).with_name(name))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test, "-k", form]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout[-20000:] + done.stderr[-2000:]


@pytest.mark.parametrize(("name", "form"), RUNS)
def test_in_the_interpreter(name: str, form: str) -> None:
    assert not failures(name, form, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.timeout(1800)  # every case compiles kernels of its own
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("name", "form"), RUNS)
def test_on_a_gpu(name: str, form: str) -> None:
    assert not failures(name, form, PLANLM_TEST_DEVICE="cuda")


def test_the_compile_report_reaches_every_kernel() -> None:
    code = """
from benchmarks import compile_report

jobs = compile_report.jobs([90])
assert not list(compile_report.forgotten(jobs))
assert list(compile_report.forgotten(jobs[:1]))
row = compile_report.compile_job(next(job for job in jobs if job.kernel == "logits_bwd_kernel"))
assert row.has_product and not list(row.violations()), row
row = compile_report.compile_job(next(job for job in jobs if job.case == "cross-entropy" and job.dtype == "bfloat16"))
assert row.registers <= 32 and not list(row.violations()), row  # two programs of 1,024 threads a multiprocessor
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_launches_name_arguments_that_their_kernels_have() -> None:
    """`launch` leaves out what a kernel does not take of a shared table: a misspelled name would be lost."""
    trees = [ast.parse(path.read_text()) for path in sorted((ROOT / "kernels").glob("triton_*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    taken = {
        node.name: {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
        for node in nodes
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    launches = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "launch"]
    assert len(launches) >= 6
    for call in launches:
        kernel = ast.unparse(call.args[0])
        named = {keyword.arg for keyword in call.keywords if keyword.arg} - {"reads", "writes"}
        assert named <= taken[kernel], (kernel, named - taken[kernel])
