"""The peak of memory that a call needs, on the CPU and on CUDA."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from planlm.progress import process_memory


def peak_memory(run: Callable[[], Sequence[Tensor]], device: torch.device) -> tuple[int, int | None]:
    """Bytes that a call needs at its peak beyond its inputs and results, in two ways.

    The first is exact for what goes through torch's allocators, in Python, in torch and in custom C++ operators: the
    profiler reports each allocation and release, and the largest sum of those alive is taken over the ones that do not
    become a result. Memory that a library takes from malloc itself, or that OpenMP workers allocate, is not in it.

    The second is everything, less exactly: on the CPU the growth of the process's peak resident memory, on CUDA that of
    `torch.cuda.max_memory_allocated`, less the bytes of the results; 0 where the peak was not above those, None where
    the system has no such count.

    Args:
        run: returns the results, not one of them a view of an input; called once.
    """
    profiled = functools.partial(profile, activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet(), profiled():
        torch.zeros(1)  # the first use in a process takes 120 MB for the profiler itself
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
