"""One case measured: a shape in a dtype on a device, all providers, as rows of results."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import resource
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.blocks import (
    DTYPES,
    SHAPES,
    Block,
    Provider,
    Shape,
    forward_backward,
    providers,
    setup,
    why_not_compiled,
)
from benchmarks.clock import Budget, interleaved, note, peak_memory
from benchmarks.correctness import check
from benchmarks.floor import Rates, compulsory, measure_rates
from benchmarks.results import Row, quantiles, spread
from planlm.kernels import cpp
from planlm.kernels.backend import choose


def measure(
    shapes: Sequence[str],
    dtypes: Sequence[str],
    names: Sequence[str],
    device: torch.device,
    budget: Budget,
    malloc: str = "default",
) -> Iterator[list[Row]]:
    """Measure every shape in every dtype; the rows of one case at a time.

    Raises:
        WrongResultError: a provider computes something else; nothing of that case has been timed.
    """
    if device.type == "cpu":
        refuse_beyond_memory()
    if "compiled" in names and (reason := why_not_compiled(device)):
        note(f"left out: compiled ({reason})")
    if "planlm" in names and device.type == "cpu" and (reason := cpp.why_not()):
        note(f"planlm runs its eager reference: {reason}")
    if (load := os.getloadavg()[0]) > 0.5:
        note(f"load average {load:.1f} at the start: times are good only where nothing else runs")
    for dtype in dtypes:
        rates = measure_rates(DTYPES[dtype], device)
        note(f"{dtype}: matrix products at {rates.flops / 1e9:,.0f} GFLOP/s, copies at {rates.bytes / 1e9:,.1f} GB/s")
        for shape in shapes:
            rows = measure_case(SHAPES[shape], dtype, names, device, rates, budget)
            yield [row | {"malloc": malloc} for row in rows]


def measure_case(
    shape: Shape, dtype: str, names: Sequence[str], device: torch.device, rates: Rates, budget: Budget
) -> list[Row]:
    """Correctness, then times, then memory of one case, from one set-up."""
    label = f"{shape.name} {dtype}"
    block = setup(shape, DTYPES[dtype], device)
    found = providers(names, device)
    note(f"{label}: checking {', '.join(found)} against float64")
    exhausted = check(block, found)
    runs = {name: _run(found[name], block) for name in found if name not in exhausted}
    note(f"{label}: timing")
    times = interleaved(runs, device, budget)
    note(f"{label}: " + ", ".join(f"{name} {1e3 * statistics.median(times[name]):,.1f} ms" for name in runs))
    case: Row = {"shape": shape.name, "dtype": dtype} | _floor(shape, DTYPES[dtype], rates) | provenance(device)
    rows = []
    for name in found:
        row: Row = case | {"provider": name}
        if name in exhausted:
            rows.append(row | {"status": "out of memory"})
            continue
        memory, process_memory = peak_memory(runs[name], device)
        timing = _timing(times[name], shape, DTYPES[dtype], rates)
        over = {other: paired(times[name], times[other]) for other in runs if other != name}
        rows.append(
            row | {"status": "ok"} | timing | {"over": over, "memory": memory, "process_memory": process_memory}
        )
    return rows


def refuse_beyond_memory() -> None:
    """Let an allocation beyond nine tenths of the free memory fail: Linux would grant it and kill the process later."""
    meminfo, status = Path("/proc/meminfo"), Path("/proc/self/status")
    if not meminfo.exists():
        return
    free, used = (
        1024 * int(line.split()[1])
        for path, field in ((meminfo, "MemAvailable:"), (status, "VmData:"))
        for line in path.read_text().splitlines()
        if line.startswith(field)
    )
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (used + free * 9 // 10, hard))


@functools.cache
def provenance(device: torch.device) -> Row:
    """What a row was measured with: device, threads, versions, the backend that PlanLM chooses, commit, date."""
    cuda = device.type == "cuda"
    backend = choose("plan_projection", device, torch.float32)
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "planlm": _version("planlm"),
        "backend": backend.name if backend else "reference",
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _run(provider: Provider, block: Block) -> Callable[[], list[Tensor]]:
    """Forward and backward without arguments: the outputs, and the gradients but for those that are upstream itself."""

    def run() -> list[Tensor]:
        outputs, gradients = forward_backward(provider, block)
        given = {dy.untyped_storage().data_ptr() for dy in block.upstream}
        return [*outputs, *(tensor for tensor in gradients if tensor.untyped_storage().data_ptr() not in given)]

    return run


def _floor(shape: Shape, dtype: torch.dtype, rates: Rates) -> Row:
    work = compulsory(shape, dtype)
    return {
        "flops": work.flops,
        "bytes": work.bytes,
        "flops_per_s": rates.flops,
        "bytes_per_s": rates.bytes,
        "floor": rates.floor(work),
    }


def _timing(times: Sequence[float], shape: Shape, dtype: torch.dtype, rates: Rates) -> Row:
    """Median, spread and what they mean against the rates; times in seconds."""
    work = compulsory(shape, dtype)
    p20, median, p80 = quantiles(times)
    floor = rates.floor(work)
    return {
        "repetitions": len(times),
        "processes": 1,
        "median": median,
        "p20": p20,
        "p80": p80,
        "min": min(times),
        "ratio": median / floor,
        "roofline": rates.roofline(work) / median,
        "gb_per_s": work.bytes / median / 1e9,
        "tflop_per_s": work.flops / median / 1e12,
    }


def paired(times: Sequence[float], others: Sequence[float]) -> Row:
    """Times over those of another provider, round by round: what slowed a whole round down cancels."""
    rounds = [ours / theirs for ours, theirs in zip(times, others, strict=False)]
    return spread(rounds)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, run in the tree that these benchmarks belong to; None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
