"""Time and memory of a call, on the CPU and on CUDA."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from planlm.kernels import cpp
from planlm.progress import process_memory

Result = TypeVar("Result")

LEAST_REPETITIONS = 3
"""A slow provider is repeated this often whatever its budget: fewer would have no spread."""


@dataclass(frozen=True)
class Budget:
    """When to stop repeating a provider: after `repetitions`, or earlier when it has run for `seconds`."""

    repetitions: int = 200
    seconds: float = 10.0

    def spent(self, times: Sequence[float]) -> bool:
        """Whether these times are enough."""
        return len(times) >= self.repetitions or (len(times) >= LEAST_REPETITIONS and sum(times) >= self.seconds)


def timed(run: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds that a call takes, and its result, so that freeing it is not timed.

    On CUDA: time between two events, after the L2 cache has been overwritten.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result
    _flush_buffer(device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, result


def interleaved(
    runs: Mapping[str, Callable[[], object]], device: torch.device, budget: Budget, warm_up: int = 10
) -> dict[str, list[float]]:
    """Seconds of every repetition by name, in the order A B C A B C …: what slows the machine down slows all of them.

    Compiling is over before. Each first makes `warm_up` runs, or as many as a tenth of the budget takes, that are not
    counted: the process grows to its size in them, and its first use of a page can cost more than the work on it.
    """
    settling = Budget(warm_up, budget.seconds / 10)
    for run in runs.values():
        spent: list[float] = []
        while len(spent) < settling.repetitions and sum(spent) < settling.seconds:
            spent.append(timed(run, device)[0])
    times: dict[str, list[float]] = {name: [] for name in runs}
    while waiting := [name for name, spent in times.items() if not budget.spent(spent)]:
        for name in waiting:
            times[name].append(timed(runs[name], device)[0])
    return times


def peak_memory(run: Callable[[], Sequence[Tensor]], device: torch.device) -> tuple[int, int | None]:
    """Bytes that a call needs at its peak beyond its inputs and results, in two ways.

    The first is exact for what goes through torch's allocators, in Python, in torch and in custom C++ operators: the
    profiler reports each allocation and release, and the largest sum of those alive is taken over the ones that do not
    become a result. Memory that a library takes from malloc itself, or that OpenMP workers allocate, is not in it.

    The second is everything, less exactly: on the CPU the growth of the process's peak resident memory, on CUDA that of
    `torch.cuda.max_memory_allocated`, less the bytes of the results; 0 where the peak was not above those, None where
    the system has no such count. Blocks that PlanLM keeps for its next large results are given back before.

    Args:
        run: returns the results, not one of them a view of an input; called once.
    """
    profiled = functools.partial(profile, activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet(), profiled():
        torch.zeros(1)  # the first use in a process takes 120 MB for the profiler itself
    if device.type == "cpu" and cpp.why_not() is None:
        torch.ops.planlm.release_blocks()
    before = _start_peak(device)
    with _quiet(), profiled() as profiler:
        results = run()
    peak = _peak(device)
    kept: dict[int, int] = {}
    for tensor in results:
        storage = tensor.untyped_storage().data_ptr()
        kept[storage] = kept.get(storage, 0) + tensor.nbytes
    assert profiler.profiler is not None
    allocations = _allocations(profiler.profiler.kineto_results.experimental_event_tree(), device)
    exact, num_results = _peak_of_temporaries(allocations, kept)
    return exact, None if peak is None or before is None else max(0, peak - before - num_results)


def note(text: str) -> None:
    """A line of progress on stderr, with the seconds since the start."""
    print(f"[{time.perf_counter() - _STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


_STARTED = time.perf_counter()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the profiler's log, which C++ writes whatever its level, off stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _peak_of_temporaries(allocations: Sequence[tuple[int, int]], kept: Mapping[int, int]) -> tuple[int, int]:
    """Largest number of bytes alive that belong to no result, and the bytes of the results that were allocated.

    Args:
        allocations: (address, bytes) in order of time; bytes are negative where the block is released.
        kept: bytes of results by address. The last block allocated there holds them.
    """
    last = {address: position for position, (address, size) in enumerate(allocations) if size > 0 and address in kept}
    alive: dict[int, int] = {}
    current = peak = results = 0
    for position, (address, size) in enumerate(allocations):
        if size < 0:
            current -= alive.pop(address, 0)  # 0: a block from before the call
            continue
        result = min(size, kept[address]) if last.get(address) == position else 0
        alive[address] = size - result
        current, results = current + size - result, results + result
        peak = max(peak, current)
    return peak, results


def _allocations(tree: Sequence[Any], device: torch.device) -> list[tuple[int, int]]:
    """(address, bytes) of every allocation and release on a device, in order of time."""
    from torch._C._profiler import _EventType

    found, waiting = [], list(tree)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == device.type:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda event: event[0])]


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    """Twice the L2 cache."""
    return torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)


def _start_peak(device: torch.device) -> int | None:
    """Let the peak begin at what is in use now, with free memory given back to the system; returns that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM falls to VmRSS
    except OSError:
        return None
    return process_memory("VmRSS")


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_memory("VmHWM")
