"""How the Triton kernels are launched: tile sizes per architecture and dtype, opt-in tuning, one door for launches.

**Where the sizes come from.** benchmarks/compile_report shows registers and shared memory of every one.

- Products sum in float32: a 128 by 128 tile takes 64 registers of each of 256 threads (8 warps). In mixture_fwd the
  scores, their exponentials, noise and addresses come on top, about five registers an entry: DEPTH is 32 there and 64
  elsewhere, which in half precision is 128 bytes, the widest swizzle of shared memory.
- wgmma (sm_90) multiplies 64 rows per group of four warps and tcgen05 (sm_100) 64 or 128 rows, reading operands from
  shared memory. mma.sync (sm_80, sm_120) keeps them in registers: tiles of mixture_fwd and projection_fwd, which
  compute an operand, have 64 rows or half the DEPTH there.
- Three stages of both operands are at most 96 KB, where a block has 163 KB (sm_80), 227 KB (sm_90, sm_100) or 99 KB
  (sm_120, hence two stages where an operand is float32 on its way there; sm_86 and sm_89, which use sm_80's tables).
- A float32 product is three tf32 products ("tf32x3", which keeps 1e-5) of operands that are split in registers, at
  twice the bytes each: 64 by 64, and DEPTH 16 in mixture_fwd and where mma.sync holds a computed operand as well.
- Rows that do not start at multiples of 16 elements are read one element at a time, with an address each ("ragged"):
  the tiles are small and there is nothing to pipeline.
- Kernels without a product read 256 or 512 bytes of a row at a time, 16 bytes a thread.

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
from typing import Any

import torch
import triton
from torch import Tensor

from . import environment

INTERPRETED = bool(triton.knobs.runtime.interpret)
ARCHITECTURES = (80, 90, 100, 120)
_PROCESSORS = {0: 8, 80: 108, 90: 132, 100: 148, 120: 170}
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
    """One launch, as observers see it: what `launch` was given, and all of the kernel's arguments but `constants`."""

    kernel: Any
    grid: tuple[int, ...]
    tiles: Tiles
    reads: tuple[Tensor | int, ...]
    writes: tuple[Tensor | int, ...]
    arguments: dict[str, Any]


_WIDE, _FLAT = Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 64, 8, 3)
_SHALLOW, _FLAT_SHALLOW = Tiles(128, 128, 16, 8, 3), Tiles(64, 128, 32, 8, 3)
_HALF: dict[str, dict[int, tuple[Tiles, ...]]] = {
    "mixture_fwd": {
        80: (_FLAT_SHALLOW, _SHALLOW),
        90: (Tiles(128, 128, 32, 8, 3), Tiles(64, 256, 32, 8, 3), _FLAT_SHALLOW),
        100: (Tiles(128, 128, 32, 8, 2), _SHALLOW, _FLAT_SHALLOW),
        120: (_FLAT_SHALLOW, _SHALLOW),
    },
    "projection_fwd": {
        80: (_FLAT,),
        90: (_WIDE, _FLAT),
        100: (_WIDE, _FLAT),
        120: (Tiles(64, 128, 64, 8, 2), Tiles(128, 64, 64, 8, 2)),
    },
    "projection_bwd": dict.fromkeys(ARCHITECTURES, (_WIDE, _FLAT)),
    "mixture_bwd": {
        80: (_WIDE, Tiles(128, 128, 32, 8, 3)),
        90: (_WIDE, _FLAT),
        100: (Tiles(128, 128, 64, 8, 2), _FLAT),
        120: (_WIDE, _FLAT),
    },
}
_SQUARE, _SQUARE_SHALLOW = (Tiles(64, 64, 32, 4, 2),), (Tiles(64, 64, 16, 4, 2),)
_FULL: dict[str, dict[int, tuple[Tiles, ...]]] = {
    "mixture_fwd": dict.fromkeys(ARCHITECTURES, _SQUARE_SHALLOW),
    "projection_fwd": {80: _SQUARE_SHALLOW, 90: _SQUARE, 100: _SQUARE, 120: _SQUARE_SHALLOW},
    "projection_bwd": dict.fromkeys(ARCHITECTURES, _SQUARE),
    # With four warps it spills on sm_120.
    "mixture_bwd": {80: _SQUARE, 90: _SQUARE, 100: _SQUARE, 120: (Tiles(64, 64, 32, 8, 2),)},
}
RAGGED = Tiles(64, 64, 16, 8, 1)
_ELEMENTWISE = {
    "combine_fwd": (Tiles(16, 128),),
    "add_plan_fwd": (Tiles(16, 256), Tiles(8, 256)),
    "add_plan_bwd": (Tiles(16, 128), Tiles(16, 64, num_warps=2)),  # with four, the gate's part spills on sm_90
}


def candidates(kernel: str, kind: str, architecture: int) -> tuple[Tiles, ...]:
    """Configurations of a kernel ("mixture_fwd"), the default first; kind: "half", "full" precision or "ragged"."""
    if architecture == 0:
        return (Tiles(16, 16, 16),)  # the interpreter: small, so that small tests have several of every kind
    if kernel in _ELEMENTWISE:
        return _ELEMENTWISE[kernel]
    return (RAGGED,) if kind == "ragged" else (_HALF if kind == "half" else _FULL)[kernel][architecture]


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
    """Launch a kernel on its tensors' device: the only place where one is. An empty grid is none.

    Args:
        kernel (Any): the Triton kernel.
        grid (tuple[int, ...]): number of programs along each axis.
        tiles (Tiles): the `constants`, and the options.
        reads, writes (Sequence[Tensor | int | None]): what the kernel touches, for observers: whole tensors, or the
            bytes of a part of one; None is left out.
        **arguments (Any): the kernel's arguments, by name, less the `constants` and strides (`NAME_stride` is that of
            `NAME`'s rows); what it does not take is left out.
    """
    if 0 in grid:
        return
    touched = [tuple(item for item in items if item is not None) for items in (reads, writes)]
    taken = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    for name in kernel.arg_names:
        if name.endswith("_stride"):
            matrix = arguments[name.removesuffix("_stride")]
            taken[name] = 0 if matrix is None else matrix.stride(0)
    request = Launch(kernel, grid, tiles, touched[0], touched[1], taken)
    if _observer is not None and not _observer(request):
        return
    sample = next(item for item in touched[1] if isinstance(item, Tensor))
    if sample.is_meta:  # without data there is nothing to run on
        return
    with torch.cuda.device_of(sample):
        kernel[grid](**taken, **constants(request), num_warps=tiles.num_warps, num_stages=tiles.num_stages)


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
    """The matrix itself where its columns are adjacent, else a contiguous copy: what every kernel asks of a matrix."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def choose_tiles(
    kernel: str,
    sizes: tuple[int, ...],
    operand: Tensor,
    *matrices: Tensor | None,
    trial: Callable[[Tiles], object] | None = None,
) -> Tiles:
    """The configuration to launch a kernel with: the table's, or the measured one with PLANLM_TUNE=1.

    Args:
        kernel (str): its name without "_kernel".
        sizes (tuple[int, ...]): K, A, D, as far as the kernel knows them; never S or T.
        operand (Tensor): of its product: dtype and device decide.
        *matrices (Tensor | None): the other matrices that it reads or writes: alignment decides.
        trial (Callable[[Tiles], object] | None): one complete run, repeatable; None: not to be measured.
    """
    kind = "full" if operand.dtype == torch.float32 else "half"
    for matrix in (operand, *matrices):
        if matrix is not None and matrix.numel() > 0 and (matrix.stride(0) % 16 or matrix.data_ptr() % 16):
            kind = "ragged"
    options = candidates(kernel, kind, architecture_of(operand.device))
    if trial is None or len(options) == 1 or _observer is not None or not environment.tune():
        return options[0]
    rounded = "x".join(str(triton.next_power_of_2(size)) for size in sizes)
    device = torch.cuda.get_device_name(operand.device)
    key = f"{device} | triton {triton.__version__} | {kernel} | {kind} | {operand.dtype} | {rounded}"
    winners = _winners()
    if winners.get(key) not in options:  # never measured, or with other tables
        winners[key] = min(options, key=lambda tiles: float(triton.testing.do_bench(lambda: trial(tiles))))
        _save(winners)
    return winners[key]


@cache
def _winners() -> dict[str, Tiles]:
    path = environment.cache() / "tiles.json"
    try:
        return {key: Tiles(**entry) for key, entry in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        print(f"planlm: ignoring {path}, which cannot be read ({error}); tiles are measured again", file=sys.stderr)
        return {}


def _save(winners: dict[str, Tiles]) -> None:
    path = environment.cache() / "tiles.json"
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({key: asdict(tiles) for key, tiles in winners.items()}, indent=1))
        partial.replace(path)
    except OSError as error:
        print(f"planlm: cannot keep measured tiles in {path} ({error})", file=sys.stderr)
