"""Compile every Triton kernel and `csrc/*.cu` ahead of time, without a GPU, and report what the compiler made of it.

    python -m benchmarks.compile_report [--architectures 80,90,100,120] [--out docs/compile_report.md] [--json FILE]

The backend's own functions run on tensors without data and every launch they ask for is compiled instead, in each
configuration of the tables: nothing is listed twice, and a kernel that no case reaches fails the report. Exits with 1
and one line per violation where a kernel spills registers, needs more shared memory than a block has, or has a product
and no tensor-core instruction.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

# Keeps what this triton does by default, and its warning away.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from planlm.kernels import triton_addition, triton_backward, triton_forward, triton_projection, triton_tiles

ROOT = Path(__file__).parents[1]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes that a block may have, by architecture."""
TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
MODULES = (triton_forward, triton_backward, triton_addition)


@dataclass(frozen=True)
class Job:
    """One compilation, in plain data so that another process can do it."""

    case: str
    module: str
    kernel: str
    architecture: int
    dtype: str
    tiles: triton_tiles.Tiles
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]

    @property
    def code(self) -> tuple[Any, ...]:
        """What decides the result: jobs that agree in it are one."""
        return self.kernel, self.architecture, self.tiles, self.signature, self.constants, self.aligned


@dataclass(frozen=True)
class Row:
    """What one compilation gave."""

    case: str
    kernel: str
    architecture: int
    dtype: str
    tiles: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    has_product: bool

    def violations(self) -> Iterator[str]:
        """What must not be, in words."""
        where = f"{self.kernel} sm_{self.architecture} {self.dtype} {self.tiles} ({self.case})"
        if self.spill_bytes > 0:
            yield f"{where}: spills {self.spill_bytes} bytes"
        limit = SHARED_MEMORY.get(self.architecture, 0)
        if limit and self.shared_bytes > limit:
            yield f"{where}: {self.shared_bytes} bytes of shared memory, {limit} there are"
        if self.has_product and self.tensor_core_instructions == 0:
            yield f"{where}: a product without a tensor-core instruction"


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the backend that between them reach every kernel and every option that changes its code, by name."""
    yield "gate", partial(run_addition, dtype, True)
    project = partial(run_projection, dtype)
    yield "everything", partial(project, noise=True, oracle=True)
    if dtype == torch.float16:
        return  # as bfloat16
    yield "no gate", partial(run_addition, dtype, False)
    yield "plain", project
    yield "top-k", partial(project, top_k=8, oracle=True)
    yield "few sentences", partial(project, noise=True, oracle=True, sizes=(257, 8192, 768, 2304))
    yield "unaligned rows", partial(project, noise=True, oracle=True, sizes=(1001, 5001, 385, 769))
    yield "ones", partial(project, noise=True, oracle=True, sizes=(1, 1, 1, 1))
    yield "associated", partial(project, oracle=True, with_weight=False)
    yield "statistics", partial(project, oracle=True, with_codebook=False)
    yield "from hidden", partial(project, oracle=True, noise=True, from_hidden=True)
    if dtype == torch.bfloat16:
        yield "float32 logits", partial(project, noise=True, oracle=True, logits=torch.float32)


def run_projection(
    dtype: torch.dtype,
    *,
    sizes: tuple[int, int, int, int] = (4097, 8192, 768, 2304),
    logits: torch.dtype | None = None,
    noise: bool = False,
    oracle: bool = False,
    top_k: int = 0,
    with_weight: bool = True,
    with_codebook: bool = True,
    from_hidden: bool = False,
) -> None:
    """Forward and backward, with every gradient, of tensors without data. Sizes: S, K, A, D."""
    num_sentences, num_actions, size, plan_size = sizes
    if not with_weight:
        plan_size = size

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    inputs: tuple[Tensor | None, ...] = (
        empty(num_sentences, 512) if from_hidden else empty(num_sentences, num_actions, of=logits or dtype),
        empty(num_actions, 512) if from_hidden else None,
        empty(num_actions) if from_hidden else None,
        empty(num_actions, size) if with_codebook else None,
        empty(plan_size, size) if with_codebook and with_weight else None,
        empty(plan_size) if with_codebook and oracle else None,
        empty(num_sentences, num_actions, of=logits or dtype) if noise else None,
        empty(num_sentences, of=torch.int64) if oracle else None,
        empty(num_sentences, of=torch.float32) if oracle and with_codebook else None,
    )
    # 1 would leave out the statistics of the logits.
    temperature = 0.5
    projected, *statistics, best, mixture, rows, cut = triton_projection.plan_projection(*inputs, temperature, top_k)
    needs = [tensor is not None for index, tensor in enumerate(inputs) if index != 7]
    triton_projection.plan_projection_backward(
        projected if with_codebook else None, *statistics, *inputs, best, mixture, rows, cut, temperature, top_k, needs
    )


def run_addition(dtype: torch.dtype, gated: bool) -> None:
    """Forward and backward of `add_plan`; the plan is a column slice of a stacked one."""
    x = torch.empty(16384, 768, dtype=dtype, device="meta")
    plan = torch.empty(512, 2304, dtype=dtype, device="meta")[:, :768]
    ids = torch.empty(16384, dtype=torch.int64, device="meta")
    gate = torch.empty(768, dtype=dtype, device="meta") if gated else None
    triton_addition.add_plan(x, plan, ids, gate)
    triton_addition.add_plan_backward(x, plan, ids, gate, [True, gated])


def jobs(architectures: list[int]) -> list[Job]:
    """Every compilation: cases times dtypes times architectures times configurations, the same code once."""
    found: dict[tuple[Any, ...], Job] = {}

    def collect(case: str, dtype: torch.dtype, architecture: int, request: triton_tiles.Launch) -> bool:
        kind = "full" if dtype == torch.float32 else "half"
        kind = "ragged" if request.tiles == triton_tiles.RAGGED else kind
        name = request.kernel.fn.__name__.removesuffix("_kernel")
        for tiles in triton_tiles.candidates(name, kind, architecture):
            job = make_job(case, replace(request, tiles=tiles), architecture, str(dtype).removeprefix("torch."))
            found.setdefault(job.code, job)
        return False

    for architecture in architectures:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for case, run in calls(dtype):
                with triton_tiles.observed(partial(collect, case, dtype, architecture), architecture):
                    run()
    return list(found.values())


def make_job(case: str, request: triton_tiles.Launch, architecture: int, dtype: str) -> Job:
    """The specialisation that Triton's launcher would compile for a launch."""
    values = {**request.arguments, **triton_tiles.constants(request)}
    signature, constants, aligned = [], [], []
    for index, parameter in enumerate(request.kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        if isinstance(value, Tensor):
            kind = POINTERS[value.dtype]
            offset = value.storage_offset() * value.element_size()
        else:
            kind = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
            offset = 1 if isinstance(value, float) else value
        signature.append((name, kind))
        if offset % 16 == 0:
            aligned.append(index)
    return Job(
        case, request.kernel.fn.__module__, request.kernel.fn.__name__, architecture, dtype, request.tiles,
        tuple(signature), tuple(constants), tuple(aligned),
    )  # fmt: skip


def compile_job(job: Job) -> Row:
    """Compile for the job's architecture and read the machine code's resources."""
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    attributes = {(index,): [["tt.divisibility", 16]] for index in job.aligned}
    source = ASTSource(kernel, dict(job.signature), dict(job.constants), attributes)
    options = {"num_warps": job.tiles.num_warps, "num_stages": job.tiles.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", job.architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    resources = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    tiles = job.tiles
    return Row(
        job.case,
        job.kernel,
        job.architecture,
        job.dtype,
        f"{tiles.rows}x{tiles.columns}x{tiles.depth}, {tiles.num_warps} warps, {tiles.num_stages} stages",
        resources["REG"],
        # No kernel has arrays of its own: what lies on the stack has been spilled.
        max(resources["STACK"], resources["LOCAL"]),
        compiled.metadata.shared,
        len(TENSOR_CORES.findall(code)),
        "tt.dot" in compiled.asm["ttir"],
    )


def forgotten(rows: Sequence[Row | Job]) -> Iterator[str]:
    """Kernels of the modules that no case has reached."""
    reached = {row.kernel for row in rows}
    for module in MODULES:
        for name, value in vars(module).items():
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel") and name not in reached:
                yield f"{module.__name__}.{name}: no case of this report launches it"


def compile_cuda(directory: Path) -> Iterator[Row]:
    """`csrc/*.cu` with nvcc for sm_80, sm_90a and sm_100."""
    sources = sorted(directory.glob("*.cu"))
    if sources and shutil.which("nvcc") is None:
        print(f"nvcc is not installed: {len(sources)} CUDA files not compiled", file=sys.stderr)
        return
    for source in sources:
        for name in ("80", "90a", "100"):
            command = ["nvcc", f"-gencode=arch=compute_{name},code=sm_{name}", "-O3", "-std=c++17", "-Xptxas", "-v"]
            done = subprocess.run(
                [*command, "-cubin", "-o", os.devnull, str(source)], capture_output=True, text=True, check=True
            )
            log = done.stderr
            pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers(.*?)\n"
            for function, spilled, registers, rest in re.findall(pattern, log, re.DOTALL):
                shared = re.search(r"(\d+) bytes smem", rest)
                memory = int(shared[1]) if shared else 0
                where = f"{source.name}: {function}"
                yield Row("nvcc", where, int(name.rstrip("a")), "", "", int(registers), int(spilled), memory, 0, False)


def summary(rows: list[Row]) -> str:
    """Markdown table: the largest values of each kernel on each architecture."""
    lines = [
        "| kernel | sm | compilations | registers | spilled bytes | shared memory | fewest tensor-core instructions |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.architecture), []).append(row)
    for (kernel, architecture), group in sorted(groups.items()):
        products = [row.tensor_core_instructions for row in group if row.has_product]
        largest = [max(getattr(row, name) for row in group) for name in ("registers", "spill_bytes", "shared_bytes")]
        cells = [kernel, architecture, len(group), *largest, min(products) if products else "no product"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def details(rows: list[Row]) -> str:
    """Markdown table: every compilation."""
    lines = [
        "| kernel | sm | dtype | case | tiles | registers | spilled | shared memory | tensor-core instructions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row.kernel, row.architecture, row.dtype, row.case, row.tiles)):
        cells = [
            row.kernel, row.architecture, row.dtype, row.case, row.tiles, row.registers, row.spill_bytes,
            row.shared_bytes, row.tensor_core_instructions if row.has_product else "no product",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def page(rows: list[Row]) -> str:
    """docs/compile_report.md."""
    return f"""# What the compiler makes of the kernels

Written by `python -m benchmarks.compile_report`: every Triton kernel in every configuration of its tables,
compiled ahead of time with Triton {triton.__version__} for every architecture, without a GPU. The tensor-core
instructions are HMMA (sm_80, sm_120), HGMMA (sm_90) and UTC*MMA (sm_100). First the largest values over dtypes, cases
and configurations, then every compilation.

{summary(rows)}

## Every compilation

{details(rows)}
"""


def main(arguments: list[str] | None = None) -> int:
    """Compile, write the report, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_report", description=__doc__.splitlines()[0])
    known = ",".join(map(str, triton_tiles.ARCHITECTURES))
    parser.add_argument(
        "--architectures", default=known, help=f"compute capabilities without the dot (default: {known})"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "compile_report.md", help="Markdown file to write")
    parser.add_argument("--json", type=Path, help="also write every row here")
    parser.add_argument("--kernels", default="", help="only kernels whose name contains this; writes no report")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    if triton_tiles.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    wanted = [
        job for job in jobs([int(name) for name in options.architectures.split(",")]) if options.kernels in job.kernel
    ]
    rows = []
    with ProcessPoolExecutor(options.processes) as pool:
        for row in pool.map(compile_job, wanted, chunksize=1):
            rows.append(row)
            if len(rows) % 25 == 0 or len(rows) == len(wanted):
                print(f"{len(rows)} of {len(wanted)} compiled", file=sys.stderr, flush=True)
    rows += compile_cuda(ROOT / "csrc")
    violations = [line for row in rows for line in row.violations()]
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if not options.kernels:
        violations += forgotten(rows)
        options.out.write_text(page(rows))
    print(summary(rows))
    print("\n".join(violations) or f"{len(rows)} compilations, no violation")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
