"""`python -m benchmarks.compile_report`: compile every Triton kernel ahead of time, without a GPU, and report on it.

The backend's own functions run on tensors without data and every launch they ask for is compiled instead, in each
configuration of the tables: nothing is listed twice, and a kernel that no case reaches fails the report. Exits with 1
and one line per violation where a kernel spills registers, needs more shared memory than a block has, or has a product
and no tensor-core instruction.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

# Keeps what this triton does by default, and its warning away.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import harness
from planlm.errors import InputError
from planlm.files import write_text
from planlm.kernels import (
    triton_addition,
    triton_cross_entropy,
    triton_launch,
    triton_mixture,
    triton_projection,
    triton_softmax,
)
from planlm.kernels.operators import ProjectionInputs, ProjectionNeeds
from planlm.progress import track

ROOT = Path(__file__).parents[1]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes that a block may have, by architecture."""
TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
MODULES = (triton_softmax, triton_mixture, triton_addition, triton_cross_entropy)


@dataclass(frozen=True)
class Job:
    """One compilation, in plain data so that another process can do it."""

    case: str
    module: str
    kernel: str
    architecture: int
    dtype: str
    tiles: triton_launch.Tiles
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]

    @property
    def code(self) -> tuple[Any, ...]:
        """What decides the result: jobs that agree in it are one."""
        return self.kernel, self.architecture, self.tiles, self.signature, self.constants, self.aligned


@dataclass(frozen=True)
class Compilation:
    """What one compilation gave."""

    case: str
    kernel: str
    architecture: int
    dtype: str
    tiles: str
    registers: int  # of a thread
    spill_bytes: int
    shared_bytes: int  # of a block
    tensor_core_instructions: int
    has_product: bool

    def violations(self) -> Iterator[str]:
        """What must not be, in words."""
        where = f"{self.kernel} sm_{self.architecture} {self.dtype} {self.tiles} ({self.case})"
        if self.spill_bytes > 0:
            yield f"{where}: spills {self.spill_bytes} bytes"
        limit = SHARED_MEMORY[self.architecture]
        if self.shared_bytes > limit:
            yield f"{where}: {self.shared_bytes} bytes of shared memory, {limit} there are"
        if self.has_product and self.tensor_core_instructions == 0:
            yield f"{where}: a product without a tensor-core instruction"


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the backend that between them reach every kernel and every option that changes its code, by name."""
    yield "gate", partial(run_addition, dtype, True)
    yield "cross-entropy", partial(run_cross_entropy, dtype)
    for streamed in (False, True):
        project = partial(run_projection, dtype, streamed=streamed)
        yield "everything", partial(project, noise=True, oracle=True)
        if dtype == torch.float16:
            continue  # as bfloat16
        yield "plain", project
        yield "top-k", partial(project, top_k=8, oracle=True)
        yield "few sentences", partial(project, noise=True, oracle=True, sizes=(257, 8192, 768, 2304))
        yield "unaligned rows", partial(project, noise=True, oracle=True, sizes=(1001, 5001, 385, 769))
        yield "ones", partial(project, noise=True, oracle=True, sizes=(1, 1, 1, 1))
        yield "few actions", partial(project, oracle=True, sizes=(1024, 8, 384, 768))
        yield "associated", partial(project, oracle=True, with_weight=False)
        yield "statistics", partial(project, oracle=True, with_codebook=False)
        yield "from hidden", partial(project, oracle=True, noise=True, from_hidden=True)
        if dtype == torch.bfloat16:
            yield "float32 logits", partial(project, noise=True, oracle=True, logits=torch.float32)
    if dtype != torch.float16:
        yield "no gate", partial(run_addition, dtype, False)
        yield "cross-entropy, unaligned rows", partial(run_cross_entropy, dtype, width=50257)


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
    streamed: bool = False,
) -> None:
    """Forward and backward, with every gradient, of tensors without data. Sizes: S, K, A, D."""
    num_sentences, num_actions, size, plan_size = sizes
    if not with_weight:
        plan_size = size

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    inputs = ProjectionInputs(
        source=empty(num_sentences, 512) if from_hidden else empty(num_sentences, num_actions, of=logits or dtype),
        head=empty(num_actions, 512) if from_hidden else None,
        head_bias=empty(num_actions) if from_hidden else None,
        codebook=empty(num_actions, size) if with_codebook else None,
        weight=empty(plan_size, size) if with_codebook and with_weight else None,
        bias=empty(plan_size) if with_codebook and oracle else None,
        noise=empty(num_sentences, num_actions, of=logits or dtype) if noise else None,
        oracle=empty(num_sentences, of=torch.int64) if oracle else None,
        oracle_weight=empty(num_sentences, of=torch.float32) if oracle and with_codebook else None,
        temperature=0.5,  # 1 would leave out the statistics of the logits
        top_k=top_k,
        streamed=streamed,
    )
    projected, log_normalizer, oracle_nll, *saved = triton_projection.plan_projection(*inputs)
    upstream = (projected if with_codebook else None, log_normalizer, oracle_nll)
    tensors, numbers = inputs[:9], inputs[9:]
    needs = [getattr(inputs, name) is not None for name in ProjectionNeeds._fields]
    triton_projection.plan_projection_backward(*upstream, *tensors, *saved, *numbers, needs)


def run_addition(dtype: torch.dtype, gated: bool) -> None:
    """Forward and backward of `add_plan`; the plan is a column slice of a stacked one."""
    x = torch.empty(16384, 768, dtype=dtype, device="meta")
    plan = torch.empty(512, 2304, dtype=dtype, device="meta")[:, :768]
    ids = torch.empty(16384, dtype=torch.int64, device="meta")
    gate = torch.empty(768, dtype=dtype, device="meta") if gated else None
    triton_addition.add_plan(x, plan, ids, gate)
    bounds = torch.empty(513, dtype=torch.int32, device="meta")
    triton_addition.sum_segments(x, ids, bounds, gate, torch.empty_like(plan), plan if gated else None)


def run_cross_entropy(dtype: torch.dtype, width: int = 50304) -> None:
    """Logits over GPT-2's vocabulary, in rows of `width`."""
    logits = torch.empty(4096, width, dtype=dtype, device="meta")[:, :50257]
    triton_cross_entropy.cross_entropy_(logits, torch.empty(4096, dtype=torch.int64, device="meta"))


def jobs(architectures: list[int]) -> list[Job]:
    """Every compilation: cases times dtypes times architectures times configurations, the same code once."""
    found: dict[tuple[Any, ...], Job] = {}

    def collect(case: str, dtype: torch.dtype, architecture: int, request: triton_launch.Launch) -> bool:
        kind = "full" if dtype == torch.float32 else "half"
        kind = "ragged" if request.tiles in triton_launch.RAGGED.values() else kind
        name = request.kernel.fn.__name__.removesuffix("_kernel")
        has_table = "DEPTH" in request.kernel.arg_names
        for tiles in triton_launch.candidates(name, kind, architecture) if has_table else [request.tiles]:
            job = make_job(case, replace(request, tiles=tiles), architecture, str(dtype).removeprefix("torch."))
            found.setdefault(job.code, job)
        return False

    for architecture in architectures:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for case, run in calls(dtype):
                with triton_launch.observed(partial(collect, case, dtype, architecture), architecture):
                    run()
    return list(found.values())


def make_job(case: str, request: triton_launch.Launch, architecture: int, dtype: str) -> Job:
    """The specialisation that Triton's launcher would compile for a launch."""
    tiles = request.tiles
    values = {**request.arguments, "ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth}
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


def compile_job(job: Job) -> Compilation:
    """Compile for the job's architecture and read the machine code's resources."""
    compiled, resources, code = machine_code(job)
    tiles = job.tiles
    return Compilation(
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


def machine_code(job: Job) -> tuple[Any, dict[str, int], str]:
    """What Triton made of a job, the resources that cuobjdump names (REG, STACK, LOCAL), and the instructions."""
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
    return compiled, {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}, code


def forgotten(found: Sequence[Compilation | Job]) -> Iterator[str]:
    """Kernels of the modules that no case has reached."""
    reached = {one.kernel for one in found}
    for module in MODULES:
        for name, value in vars(module).items():
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel") and name not in reached:
                yield f"{module.__name__}.{name}: no case of this report launches it"


QUANTITIES = ("registers", "spilled bytes", "shared memory", "fewest tensor-core instructions")


def page(found: Sequence[Compilation]) -> str:
    """Every compilation, below the largest values of each kernel on each architecture."""
    key = attrgetter("kernel", "architecture", "dtype", "case", "tiles")
    each = [(*key(one), *_quantities([one])) for one in sorted(found, key=key)]
    everything = _table(("kernel", "sm", "dtype", "case", "tiles", *QUANTITIES), each)
    return "\n\n".join([_opening(found), by_kernel(found), "## Every compilation", everything]) + "\n"


def by_kernel(found: Sequence[Compilation]) -> str:
    """The largest values of each kernel on each architecture."""
    return _overview(found, "kernel", "architecture")


def summary(found: Sequence[Compilation], violations: Sequence[str]) -> str:
    """docs/compile_report.md: a line for each architecture, and every violation."""
    where = "`--summary docs/compile_report.md` writes this page, `--out` one with every compilation."
    lines = "\n".join(f"- {line}" for line in violations) or "No violation."
    return "\n\n".join([_opening(found), _overview(found, "architecture"), lines, where]) + "\n"


def _opening(found: Sequence[Compilation]) -> str:
    number = len({one.kernel for one in found})
    return f"""# What the compiler makes of the kernels

The {number} Triton kernels of commit {harness.commit()} in every configuration of their tables, compiled ahead of
time with Triton {triton.__version__}, without a GPU, by `python -m benchmarks.compile_report`. Registers and spilled
bytes are of a thread, shared memory is of a block, in bytes; each is the largest over dtypes, cases and configurations.
Tensor-core instructions are HMMA (sm_80, sm_120), HGMMA (sm_90) and UTC*MMA (sm_100). A kernel that spills, that needs
more shared memory than a block has, or that has a product and no tensor-core instruction is a violation."""


def _overview(found: Sequence[Compilation], *names: str) -> str:
    """The largest values of the compilations that agree in these attributes."""
    groups: dict[tuple[Any, ...], list[Compilation]] = {}
    for one in found:
        groups.setdefault(tuple(getattr(one, name) for name in names), []).append(one)
    lines = []
    for key, group in sorted(groups.items()):
        configurations = len({(one.kernel, one.tiles) for one in group})
        violations = sum(len(list(one.violations())) for one in group)
        lines.append((*key, configurations, len(group), *_quantities(group), violations))
    return _table((*names, "configurations", "compilations", *QUANTITIES, "violations"), lines)


def _quantities(group: Sequence[Compilation]) -> list[int | str]:
    """The largest of a group, but for the tensor-core instructions of its products."""
    largest = [max(getattr(one, name) for one in group) for name in ("registers", "spill_bytes", "shared_bytes")]
    products = [one.tensor_core_instructions for one in group if one.has_product]
    return [*largest, min(products) if products else "no product"]


def _table(headings: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (headings, ["---"] * len(headings), *lines))


@harness.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, write the report, and return the exit status."""
    parser = harness.parser_of("compile_report", __doc__)
    known = [str(architecture) for architecture in triton_launch.ARCHITECTURES]
    harness.add_names(parser, "architectures", known)
    text = "Markdown file with every compilation; default %(default)s"
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "compile_report.md", help=text)
    harness.add_file(parser, "summary", "also write a short one, a line for each architecture, here")
    harness.add_file(parser, "json", "also write every compilation here")
    parser.add_argument("--kernels", default="", help="only kernels whose name contains this; writes no report")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    if triton_launch.INTERPRETED:
        raise InputError("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    wanted = [job for job in jobs(list(map(int, options.architectures))) if options.kernels in job.kernel]
    with ProcessPoolExecutor(options.processes) as pool:
        found = list(track(pool.map(compile_job, wanted), "compile", len(wanted), "kernels"))
    violations = [line for one in found for line in one.violations()]
    if options.json:
        write_text(options.json, json.dumps([asdict(one) for one in found], indent=1))
    if not options.kernels:
        violations += forgotten(found)
        options.out.parent.mkdir(exist_ok=True)
        write_text(options.out, page(found))
        if options.summary:
            write_text(options.summary, summary(found, violations))
    print(by_kernel(found))
    print("\n".join(violations) or f"{len(found)} compilations, no violation")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
