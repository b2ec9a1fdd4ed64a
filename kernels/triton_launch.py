"""How the Triton kernels are launched: tile sizes, one door for launches, and what is measured on a device.

**Launches.** Triton's own binder takes 7 to 8 us of the host's time for a launch. Its result depends on the arguments
alone, so `launch` keeps the compiled kernel under those and calls it directly. A parameter that a kernel writes is
called `out_...`, or `inout_...` where it is read as well, which tells observers; the stride of NAME's rows is
`NAME_stride` and filled in here.

**Where the sizes come from.** benchmarks/compile_report shows registers and shared memory of every one.

- Products sum in float32: a 128 by 128 tile takes 64 registers of each of 256 threads (8 warps). In mixture_fwd the
  scores, their exponentials, noise and addresses come on top, about five registers an entry: DEPTH is 32 there and 64
  elsewhere, which in half precision is 128 bytes, the widest swizzle of shared memory.
- wgmma (sm_90) multiplies 64 rows per group of four warps and tcgen05 (sm_100) 64 or 128 rows, reading operands from
  shared memory. mma.sync (sm_80, sm_120) keeps them in registers: tiles of mixture_fwd, which computes an operand, have
  64 rows or half the DEPTH there.
- Three stages of both operands are at most 96 KB, where a block has 163 KB (sm_80), 227 KB (sm_90, sm_100) or 99 KB
  (sm_120; sm_86 and sm_89, which use sm_80's tables).
- A float32 product is six bfloat16 products ("bf16x6": three parts of each operand, an error of about 2^-24; "tf32x3"
  takes the same cycles and leaves 1.6e-5) of operands that are split in registers, at 1.5 times the bytes: tiles have
  64 rows, DEPTH is 16 in mixture_fwd, and where operands stay in registers logits_bwd sums over 32 columns a step.
- Rows that do not start at multiples of 16 elements are read one element at a time, with an address each ("ragged"):
  the tiles are small and there is nothing to pipeline.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from . import environment

INTERPRETED = bool(triton.knobs.runtime.interpret)
ARCHITECTURES = (80, 90, 100, 120)
_PROCESSORS = {0: 8, 80: 108, 90: 132, 100: 148, 120: 170}
"""Multiprocessors of the largest device of each architecture: a constant, so that sums do not depend on the device."""

T = TypeVar("T")


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
    """One launch, as observers see it: all of the kernel's arguments by name but for the sizes of its tiles."""

    kernel: Any
    grid: tuple[int, ...]
    tiles: Tiles
    arguments: dict[str, Any]

    @property
    def writes(self) -> tuple[Tensor, ...]:
        """The tensors that it writes."""
        return tuple(value for name, value in self._tensors() if name.startswith(("out_", "inout_")))

    @property
    def reads(self) -> tuple[Tensor, ...]:
        """The tensors that it reads."""
        return tuple(value for name, value in self._tensors() if not name.startswith("out_"))

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in self.arguments.items() if isinstance(value, Tensor))


_WIDE, _FLAT = Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 64, 8, 3)
_SHALLOW, _FLAT_SHALLOW = Tiles(128, 128, 16, 8, 3), Tiles(64, 128, 32, 8, 3)
_HALF: dict[str, dict[int, tuple[Tiles, ...]]] = {
    "mixture_fwd": {
        80: (_FLAT_SHALLOW, _SHALLOW),
        90: (Tiles(128, 128, 32, 8, 3), Tiles(64, 256, 32, 8, 3), _FLAT_SHALLOW),
        100: (Tiles(128, 128, 32, 8, 2), _SHALLOW, _FLAT_SHALLOW),
        120: (_FLAT_SHALLOW, _SHALLOW),
    },
    "logits_bwd": {
        80: (_WIDE, _FLAT),
        90: (_WIDE, _FLAT),
        100: (_FLAT, Tiles(128, 64, 64, 8, 3)),  # _WIDE spills
        120: (_WIDE, _FLAT),
    },
    "codebook_bwd": {
        80: (_WIDE, Tiles(128, 128, 32, 8, 3)),
        90: (_WIDE, _FLAT),
        100: (Tiles(128, 128, 64, 8, 2), _FLAT),
        120: (_WIDE, _FLAT_SHALLOW),  # _FLAT spills
    },
}
_SQUARE, _NARROW, _WIDE_SHALLOW = (Tiles(64, 64, 32, 4, 2),), (Tiles(64, 32, 32, 4, 3),), (Tiles(64, 128, 16, 8, 2),)
_FULL: dict[str, dict[int, tuple[Tiles, ...]]] = {
    # On sm_100 Triton gives the wide tile no tensor cores.
    "mixture_fwd": {80: _WIDE_SHALLOW, 90: _WIDE_SHALLOW, 100: (Tiles(64, 64, 16, 8, 2),), 120: _WIDE_SHALLOW},
    "logits_bwd": {80: _NARROW, 90: _SQUARE, 100: _SQUARE, 120: _NARROW},  # _SQUARE spills on sm_120
    "codebook_bwd": dict.fromkeys(ARCHITECTURES, _SQUARE),
}
RAGGED = {
    "mixture_fwd": Tiles(64, 64, 16, 8, 1),
    "logits_bwd": Tiles(64, 32, 16, 8, 1),
    "codebook_bwd": Tiles(64, 32, 16, 8, 1),
}
"""The only configuration of each where rows are ragged."""


def candidates(kernel: str, kind: str, architecture: int) -> tuple[Tiles, ...]:
    """Configurations of a kernel with a product ("mixture_fwd"), the default first.

    Args:
        kernel (str): its name without "_kernel".
        kind (str): "half", "full" precision or "ragged".
        architecture (int): of `ARCHITECTURES`, or 0: the interpreter.
    """
    if architecture == 0:
        return (Tiles(16, 16, 16),)  # small, so that small tests have several of every kind
    return (RAGGED[kernel],) if kind == "ragged" else (_HALF if kind == "half" else _FULL)[kernel][architecture]


_observer: Callable[[Launch], bool] | None = None
_pretended: int | None = None


@contextlib.contextmanager
def observed(observer: Callable[[Launch], bool] | None, architecture: int | None = None) -> Iterator[None]:
    """Show every launch inside the block to `observer`; where it returns False nothing is launched.

    With an architecture the tables of that one are used, on any device: with tensors of torch's "meta" device this
    lists what a call would launch without a GPU. Without an observer everything is launched.
    """
    global _observer, _pretended
    before = _observer, _pretended
    _observer, _pretended = observer, architecture
    try:
        yield
    finally:
        _observer, _pretended = before


_launchers: dict[tuple[Any, ...], Any] = {}
"""Compiled kernels with their grids, by what decides them: kernel, options, device and arguments, of tensors dtype and
alignment."""

_NUMBERS = frozenset((int, float, bool, type(None)))
"""What arguments are that are no tensors."""

_MAX_LAUNCHERS = 20_000
"""Sizes that change with every batch would fill the memory in the end."""


def launch(kernel: Any, grid: tuple[int, int, int], tiles: Tiles, **arguments: Any) -> None:
    """Launch a kernel on its tensors' device. An empty grid is none.

    Args:
        kernel (Any): the Triton kernel.
        grid (tuple[int, int, int]): number of programs along each axis.
        tiles (Tiles): the sizes ROWS, COLUMNS and DEPTH as far as the kernel has them, and the options.
        **arguments (Any): all others by name, less `NAME_stride`s.
    """
    if 0 in grid:
        return
    names, strides = _parameters(kernel)
    for name, matrix in strides:
        strided = arguments[matrix]
        arguments[name] = 0 if strided is None else strided.stride(0)
    arguments |= {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth}
    launch_ordered(kernel, grid, tiles, [arguments[name] for name in names])


def launch_ordered(kernel: Any, grid: tuple[int, int, int], tiles: Tiles, values: Sequence[Any]) -> None:
    """`launch` with all arguments, strides and sizes among them, in the kernel's order: half the host's time.

    The first is a tensor on the device.
    """
    if _observer is not None:
        names = zip(_parameters(kernel)[0], values, strict=True)
        named = {name: value for name, value in names if name not in ("ROWS", "COLUMNS", "DEPTH")}
        if not _observer(Launch(kernel, grid, tiles, named)):
            return
    if INTERPRETED:
        kernel[grid](*values)
        return
    device = values[0].get_device()
    key = (
        id(kernel), grid, tiles.num_warps, tiles.num_stages, device,
        *[v if v.__class__ in _NUMBERS else (v.dtype, v.data_ptr() & 15) for v in values],
    )  # fmt: skip
    run = _launchers.get(key)
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            (run or _compile(kernel, grid, tiles, values, key))(*values)
    else:
        (run or _compile(kernel, grid, tiles, values, key))(*values)


def _compile(
    kernel: Any, grid: tuple[int, int, int], tiles: Tiles, values: Sequence[Any], key: tuple[Any, ...]
) -> Callable[..., None]:
    """The kernel as these arguments want it, kept under `key` for the next time."""
    if len(_launchers) >= _MAX_LAUNCHERS:
        _launchers.clear()
    compiled = kernel.warmup(*values, grid=grid, num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    run: Callable[..., None] = compiled[grid]
    _launchers[key] = run
    return run


@cache
def _parameters(kernel: Any) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Its names in order; those that are strides with the matrix of each."""
    names = tuple(kernel.arg_names)
    return names, tuple((name, name.removesuffix("_stride")) for name in names if name.endswith("_stride"))


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return max(known for known in ARCHITECTURES if known <= 10 * major + minor)


def architecture_of(device: torch.device) -> int:
    """The table's architecture for a device: the nearest that is not newer; 0 in the interpreter."""
    if _pretended is not None:
        return _pretended
    return 0 if INTERPRETED else _capability(device)


def num_processors(device: torch.device) -> int:
    """How many programs make a full device."""
    return _PROCESSORS[architecture_of(device)]


def cdiv(size: int, step: int) -> int:
    """How many steps a size takes; Triton's own is as slow as a launch."""
    return -(-size // step)


def with_unit_columns(matrix: Tensor) -> Tensor:
    """The matrix itself where its columns are adjacent, else a contiguous copy: what every kernel asks of a matrix."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def choose_tiles(
    kernel: str, sizes: tuple[int, ...], operand: Tensor, *matrices: Tensor | None, trial: Callable[[Tiles], object]
) -> Tiles:
    """The configuration to launch a kernel with a product with: the fastest of the table, where that was measured.

    Args:
        kernel (str): its name without "_kernel".
        sizes (tuple[int, ...]): S, K, A, D, as far as the kernel knows them.
        operand (Tensor): of its product: dtype and device decide.
        *matrices (Tensor | None): the other matrices that it reads or writes: alignment decides.
        trial (Callable[[Tiles], object]): one complete run, repeatable.
    """
    kind = "full" if operand.dtype == torch.float32 else "half"
    for matrix in (operand, *matrices):
        if matrix is not None and matrix.numel() > 0 and not _is_aligned(matrix):
            kind = "ragged"
    options = candidates(kernel, kind, architecture_of(operand.device))
    return fastest(f"{kernel} | {kind} | {operand.dtype}", sizes, operand, options, trial)


def _is_aligned(matrix: Tensor) -> bool:
    """Whether Triton knows that every row begins at a multiple of 16 bytes, as wide and asynchronous loads ask for.

    It asks a stride to be a multiple of 16 elements, where 8 of half precision would do.
    """
    return matrix.stride(0) % 16 == 0 and matrix.data_ptr() % 16 == 0


def fastest(name: str, sizes: tuple[int, ...], sample: Tensor, options: Sequence[T], trial: Callable[[T], object]) -> T:
    """The fastest of several ways, measured once on each device and for each class of sizes; else the first.

    The winner is kept in a JSON file under PLANLM_CACHE (default ~/.cache/planlm): by device, Triton's version, name
    and the sizes rounded up to powers of two. PLANLM_TUNE=0 turns measuring off, and looking up with it.

    Args:
        name (str): of what is measured, with all that decides but the sizes.
        sizes (tuple[int, ...]): of the call.
        sample (Tensor): on the device.
        options (Sequence[T]): the static rule's choice first.
        trial (Callable[[T], object]): one complete run, repeatable.
    """
    if len(options) == 1 or not _has_choice(sample):
        return options[0]
    call = sample.device, name, sizes
    found: T | None = _found.get(call)
    if found is None:
        if torch.cuda.is_current_stream_capturing():  # a graph would hold what is measured
            return options[0]
        found = _found[call] = _measured(name, sizes, sample, options, trial)
    return found


_found: dict[tuple[Any, ...], Any] = {}
"""What `fastest` has answered: with names and sizes in words it would take longer than a launch."""


def _has_choice(sample: Tensor) -> bool:
    """Whether `fastest` measures: on a device, unless the user forbids it."""
    return _observer is None and _pretended is None and sample.is_cuda and environment.tune()


def _measured(
    name: str, sizes: tuple[int, ...], sample: Tensor, options: Sequence[T], trial: Callable[[T], object]
) -> T:
    """The winner of the file, or of a measurement that is then kept there."""
    rounded = "x".join(str(triton.next_power_of_2(size)) for size in sizes)
    key = f"{torch.cuda.get_device_name(sample.device)} | triton {triton.__version__} | {name} | {rounded}"
    winners = _winners()
    kept = [option for option in options if repr(option) == winners.get(key)]
    if kept:
        return kept[0]
    found = min(options, key=lambda option: float(triton.testing.do_bench(lambda: trial(option))))
    winners[key] = repr(found)  # replaces what was measured with other tables
    _save(winners)
    return found


@cache
def _winners() -> dict[str, str]:
    path = environment.cache() / "fastest.json"
    try:
        return {str(key): str(value) for key, value in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        print(f"planlm: ignoring {path}, which cannot be read ({error}); it is measured again", file=sys.stderr)
        return {}


def _save(winners: dict[str, str]) -> None:
    path = environment.cache() / "fastest.json"
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(winners, indent=1))
        partial.replace(path)
    except OSError as error:
        print(f"planlm: cannot keep what was measured in {path} ({error})", file=sys.stderr)
