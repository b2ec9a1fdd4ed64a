"""`python -m benchmarks.gpu`: the first hour on a CUDA device, one JSON file and one page of text. See docs/gpu.md.

Stages, each in a process of its own, so that what fails in one is written down and the next begins:

- machine: the device, and the rates that large products and copies reach;
- tests: `pytest -m gpu`: the whole grid of the operations on CUDA tensors, streams, graphs, bitwise repeats;
- path: every command from raw text to a generating model; a run killed and resumed, and one without graphs;
- losses: the cross-entropy against eager PyTorch, Liger and a copy;
- blocks: the plan's operations, graphed and not, in both forms, against eager and compiled PyTorch, kernel by kernel;
- steps: training steps of GPT-2-small, SmolLM2-135M and OLMo-1B, plain and joint, against eager PyTorch.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_page, gpu_path, gpu_stages, harness
from benchmarks.block import SHAPES
from benchmarks.gpu_stages import BLOCK_PROVIDERS, STEP_PROVIDERS, STEPS, Result
from planlm.errors import InputError, MachineError
from planlm.files import write_text

ROOT = Path(__file__).parents[1]


@harness.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 (a stage failed), 2 (bad usage)."""
    parser = harness.parser_of("gpu", __doc__)
    harness.add_names(parser, "stages", gpu_page.STAGES)
    harness.add_names(parser, "shapes", SHAPES)
    harness.add_names(parser, "dtypes", harness.DTYPES, default=["bf16", "float32"])
    harness.add_names(parser, "blocks", BLOCK_PROVIDERS)
    harness.add_names(parser, "lms", STEPS)
    harness.add_names(parser, "steps", STEP_PROVIDERS)
    harness.add_number(parser, "limit", 3600.0, 1.0, "seconds that a stage may take")
    harness.add_number(parser, "repetitions", 100, 2, "of each block, at most")
    parser.add_argument("--out", type=Path, default=Path("gpu"), metavar="FOLDER", help="default gpu")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise InputError("no CUDA device was found by torch: nothing was measured; see docs/gpu.md")
    found = _earlier(options.out)
    for name, run in _jobs(options).items():
        harness.note(f"stage: {name}")
        found[name] = _stage(run, options.limit)
        write_text(options.out / "gpu.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
        write_text(options.out / "gpu.txt", gpu_page.page(found))
    print(gpu_page.page(found))
    harness.note(f"wrote {options.out / 'gpu.json'} and {options.out / 'gpu.txt'}")
    return 1 if list(gpu_page.failures(found)) else 0


def _jobs(options: Any) -> dict[str, Callable[[], Result]]:
    """What is to be done, by its name in the file."""
    budget = harness.Budget(options.repetitions, seconds=2.0)
    jobs: dict[str, Callable[[], Result]] = {
        "machine": gpu_stages.machine,
        "tests": functools.partial(tests, options.out / "tests.txt"),
        "path": functools.partial(gpu_path.path, options.out / "path"),
        "losses": functools.partial(gpu_stages.losses, budget),
    }
    chosen = {name: job for name, job in jobs.items() if name in options.stages}
    if "blocks" in options.stages:
        for dtype in options.dtypes:
            job = functools.partial(gpu_stages.block_cases, options.shapes, dtype, options.blocks, budget)
            chosen[f"blocks, {dtype}"] = job
    if "steps" in options.stages:
        for lm in options.lms:
            chosen[f"steps, {lm}"] = functools.partial(gpu_stages.steps, lm, options.steps, gpu_stages.ROUNDS)
    return chosen


def _earlier(folder: Path) -> dict[str, Any]:
    """What a run with other stages has left in the folder, which is made.

    Raises:
        InputError: it is no folder, or holds another gpu.json.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "gpu.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise InputError(f"--out {folder}: needs a folder of its own ({error})") from None
    return found


def _stage(run: Callable[[], Result], limit: float) -> Result:
    begin = time.monotonic()
    try:
        found = harness.in_new_process(run, limit=limit)
    except (InputError, MachineError, harness.WrongResultError) as error:
        found = {"error": str(error)}
    return gpu_page.finite({"took": round(time.monotonic() - begin, 1), **found})


def tests(file: Path) -> Result:
    """`pytest -m gpu`, whose output goes into a file: how it ended."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", "tests"]
    with file.open("w") as output:
        done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    lines = file.read_text().strip().splitlines()
    failed = {} if done.returncode == 0 else {"error": f"pytest ended with status {done.returncode}; see {file.name}"}
    return {"summary": lines[-1:], "output": "\n".join(lines)[-20000:], **failed}


if __name__ == "__main__":
    sys.exit(main())
