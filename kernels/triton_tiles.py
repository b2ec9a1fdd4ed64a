"""How the Triton kernels are launched: tile sizes per architecture and dtype, opt-in tuning, one door for launches.

**Where the sizes come from.** A product's accumulator is float32: a tile of 128 by 128 takes 64 registers of each of 256
threads (8 warps), which leaves room for the softmax of a 128 by 64 tile of logits (32 registers, twice over) below the
255 a thread can have; 128 by 256 would need 128 + 64 and spills. wgmma (sm_90) needs 64 rows per group of four warps,
tcgen05 (sm_100) tiles of 64 or 128 rows, so no tile has fewer. DEPTH 64 makes one row of a half-precision operand 128
bytes, the widest swizzle of shared memory; three stages of both operands are 3 * 2 * 128 * 64 * 2 = 96 KB, within 163
KB (sm_80) and 227 KB (sm_90, sm_100); sm_120 has 99 KB and gets two. float32 products are three tf32 products each
("tf32x3", which keeps 1e-5): their operands are split in registers, twice the bytes each, so tiles are 64 by 64 by 32.
Elementwise kernels read rows of 128 elements or more, 16 bytes a thread.

**Tuning.** With PLANLM_TUNE=1 the first call measures the candidates and keeps the winner in a JSON file under
PLANLM_CACHE (default ~/.cache/planlm), by device, Triton's version, kernel, dtype and the sizes of the model rounded up
to powers of two. The number of sentences or tokens is no part of the key: it changes with every batch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
ARCHITECTURES = (80, 90, 100, 120)
_PROCESSORS = {0: 4, 80: 108, 90: 132, 100: 148, 120: 170}
"""Multiprocessors of the largest device of each architecture: a constant, so that sums do not depend on the device."""


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and launch options of one kernel.

    Attributes:
        rows, columns (int): of the tile that a program writes.
        depth (int): summed over in each step of a program's loop; 0 in kernels without a product.
        num_warps, num_stages (int): Triton's options.
    """

    rows: int
    columns: int
    depth: int = 0
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Launch:
    """One launch, as observers see it.

    Attributes:
        kernel (Any): the Triton kernel.
        grid (tuple[int, ...]): number of programs along each axis.
        tiles (Tiles): the configuration.
        reads, writes (tuple[Tensor | int, ...]): whole tensors, or the bytes of a part of one.
        arguments (dict[str, Any]): the kernel's arguments by name, without those that `tiles` fills.
    """

    kernel: Any
    grid: tuple[int, ...]
    tiles: Tiles
    reads: tuple[Tensor | int, ...]
    writes: tuple[Tensor | int, ...]
    arguments: dict[str, Any]


_SMALL = Tiles(16, 16, 16)
_HALF = Tiles(128, 128, 64, num_warps=8)
_HALF_NARROW = Tiles(64, 128, 64)
_FULL = Tiles(64, 64, 32)
_TABLE: dict[tuple[int, str], dict[str, tuple[Tiles, ...]]] = {}
"""By architecture (0: the interpreter) and kind of operand: each kernel's candidates, the default first."""


def candidates(kernel: str, kind: str, architecture: int) -> tuple[Tiles, ...]:
    """Configurations of a kernel ("mixture_fwd") for operands that are "half" or "full"; the default comes first."""
    if architecture == 0:
        return (_SMALL,)
    memory_bound = {
        "combine_fwd": (Tiles(16, 128),),
        "add_plan_fwd": (Tiles(16, 256), Tiles(8, 256)),
        "add_plan_bwd": (Tiles(16, 128),),
        "gate_bwd": (Tiles(32, 64),),
    }
    if kernel in memory_bound:
        return memory_bound[kernel]
    return (_HALF, _HALF_NARROW) if kind == "half" else (_FULL,)


_observer: Callable[[Launch], bool] | None = None
_pretended: int | None = None


@contextlib.contextmanager
def observed(observer: Callable[[Launch], bool], architecture: int | None = None) -> Iterator[None]:
    """Show every launch inside the block to `observer`; where it returns False nothing is launched.

    With an architecture the tables of that one are used, on any device: with tensors of torch's "meta" device this
    lists what a call would launch without a GPU.
    """
    global _observer, _pretended
    before = _observer, _pretended
    _observer, _pretended = observer, architecture
    try:
        yield
    finally:
        _observer, _pretended = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tiles: Tiles,
    *,
    reads: Sequence[Tensor | int | None],
    writes: Sequence[Tensor | int | None],
    **arguments: Any,
) -> None:
    """Launch a kernel on its tensors' device: the only place where one is.

    Args:
        kernel (Any): the Triton kernel.
        grid (tuple[int, ...]): number of programs along each axis.
        tiles (Tiles): fills the kernel's ROWS, COLUMNS and DEPTH, as far as it has them, and the options.
        reads, writes (Sequence[Tensor | int | None]): what the kernel touches, for observers: whole tensors, or the
            bytes of a part of one; None is left out.
        **arguments (Any): the kernel's other arguments, by name.
    """
    touched = [tuple(item for item in items if item is not None) for items in (reads, writes)]
    request = Launch(kernel, grid, tiles, touched[0], touched[1], arguments)
    if _observer is not None and not _observer(request):
        return
    sample = next(item for item in touched[1] if isinstance(item, Tensor))
    with torch.cuda.device_of(sample):
        kernel[grid](**arguments, **constants(request), num_warps=tiles.num_warps, num_stages=tiles.num_stages)


def constants(request: Launch) -> dict[str, int]:
    """The kernel's compile-time sizes that its tiles decide."""
    sizes = {"ROWS": request.tiles.rows, "COLUMNS": request.tiles.columns, "DEPTH": request.tiles.depth}
    return {name: size for name, size in sizes.items() if name in request.kernel.arg_names}


def architecture_of(device: torch.device) -> int:
    """The table's architecture for a device: the nearest that is not newer; 0 in the interpreter."""
    if _pretended is not None:
        return _pretended
    if INTERPRETED:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return max(known for known in ARCHITECTURES if known <= 10 * major + minor)


def num_processors(device: torch.device) -> int:
    """How many programs make a full device."""
    return _PROCESSORS[architecture_of(device)]


def with_unit_columns(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows are dense, else a contiguous copy: what every kernel asks of a matrix."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def choose_tiles(
    kernel: str, operand: Tensor, sizes: tuple[int, ...], trial: Callable[[Tiles], object] | None = None
) -> Tiles:
    """The configuration to launch a kernel with: the table's, or the measured one with PLANLM_TUNE=1.

    Args:
        kernel (str): its name without "_kernel".
        operand (Tensor): its dtype and device decide.
        sizes (tuple[int, ...]): K, A, D, as far as the kernel knows them; never S or T.
        trial (Callable[[Tiles], object] | None): one complete run, repeatable; None: not to be measured.
    """
    kind = "full" if operand.dtype == torch.float32 else "half"
    options = candidates(kernel, kind, architecture_of(operand.device))
    if trial is None or len(options) == 1 or _observer is not None or os.environ.get("PLANLM_TUNE") != "1":
        return options[0]
    rounded = "x".join(str(triton.next_power_of_2(size)) for size in sizes)
    device = torch.cuda.get_device_name(operand.device)
    key = f"{device} | triton {triton.__version__} | {kernel} | {operand.dtype} | {rounded}"
    winners = _winners()
    if key not in winners:
        winners[key] = min(options, key=lambda tiles: float(triton.testing.do_bench(lambda: trial(tiles))))
        _save(winners)
    return winners[key]


def _cache_file() -> Path:
    return Path(os.environ.get("PLANLM_CACHE") or Path.home() / ".cache" / "planlm") / "tiles.json"


@cache
def _winners() -> dict[str, Tiles]:
    path = _cache_file()
    try:
        return {key: Tiles(**entry) for key, entry in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        print(f"planlm: ignoring {path}, which cannot be read ({error}); tiles are measured again", file=sys.stderr)
        return {}


def _save(winners: dict[str, Tiles]) -> None:
    path = _cache_file()
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({key: asdict(tiles) for key, tiles in winners.items()}, indent=1))
        partial.replace(path)
    except OSError as error:
        print(f"planlm: cannot keep measured tiles in {path} ({error})", file=sys.stderr)
