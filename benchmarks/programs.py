"""What the programs of PlanLM's Triton kernels do, as far as neither tensors nor machine code say it.

A kernel that is not in `KERNELS` is taken to read its tensors once, spread evenly over its programs, in loops that go
on until they have: right for all that go over rows or tokens. Products are in the table, with the tiles of their
operands in the order in which programs read them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from benchmarks.devices import Device
from benchmarks.machine_code import Code, Cost

if TYPE_CHECKING:
    from planlm.kernels.triton_launch import Launch

LONGEST_SENTENCE = 4.0
"""Times the mean: assumed, as lengths are log-normal with a deviation of .6, of some hundred sentences."""

STEPS = 8
"""Pieces in which a panel is read: programs of a wave are about as far with theirs."""


@dataclass(frozen=True)
class Panel:
    """An operand as programs read it: in `count` panels of `bytes` each, and which of them a program reads."""

    bytes: float
    count: int
    of: Callable[[int], int]


@dataclass(frozen=True)
class Role:
    """Programs of a kernel that do the same; a kernel's roles follow each other in program ids and in its code.

    Attributes:
        programs (int): how many.
        flops (float): of the products of one, as tensor cores do them.
        read (float): bytes of one, where it has no product.
        panels (tuple[Panel, ...]): of a product.
        iterations (tuple[float, ...]): of each loop of the kernel, where its code does not say.
        back (bool): whether the panels are read a second time, from their ends.
        longest (float): times as many iterations the slowest program has.
    """

    programs: int
    flops: float = 0.0
    read: float = 0.0
    panels: tuple[Panel, ...] = ()
    iterations: tuple[float, ...] = ()
    back: bool = False
    longest: float = 1.0


class _LRU(Protocol):
    def use(self, key: tuple[int, int], size: int) -> int: ...


def roles_of(launch: Launch) -> list[Role]:
    """The roles of a launch's programs."""
    name = launch.kernel.__name__.removesuffix("_kernel")
    if name in KERNELS:
        return KERNELS[name](launch)
    count = math.prod(launch.grid)
    sizes = (item if isinstance(item, int) else item.numel() * item.itemsize for item in launch.reads)
    return [Role(count, read=sum(sizes) / count)]


def cost(role: Role, number: int, num_roles: int, code: Code, longest: float = 1.0) -> Cost:
    """What one program of a role takes, or one of `longest` times as many iterations.

    A loop with a product is that of the role that it belongs to, in order, and runs until the role's FLOPs are done;
    others run until what the program reads has been read, and in a role with a product once.
    """
    total = Cost().plus(code.straight, 1 / num_roles)
    products = [index for index, loop in enumerate(code.loops) if loop.flops]
    own = products[number::num_roles] if len(products) > 1 else products
    for index, loop in enumerate(code.loops):
        if role.iterations:
            times = role.iterations[min(index, len(role.iterations) - 1)] * longest
        elif loop.flops:
            times = role.flops / loop.flops / len(own) if index in own else 1 / num_roles
        elif role.flops or not loop.loaded:
            times = 1.0
        else:
            times = max(1.0, role.read / max(each.loaded for each in code.loops))
        total = total.plus(loop, times - 1)
    return total


def makespan(counts: Sequence[int], costs: Sequence[Cost], resident: int, device: Device) -> tuple[float, float]:
    """Cycles until all programs are through, and the waves in which they run.

    Args:
        counts: programs of each role.
        costs: of one of them.
        resident: programs that an SM holds at a time.
        device: the device.
    """
    total = sum(counts)
    at_once = min(resident, -(-total // device.processors))

    def together(each: Cost, programs: int) -> float:
        """Cycles of programs that share an SM."""
        shared = max(each.slots, each.tensor, each.loaded / device.sm_bytes)
        return max(each.alone, programs * shared)

    waves = total / (device.processors * at_once)
    if len(counts) == 1:
        of_one = -(-total // device.processors)  # programs of the SM that has most
        whole, rest = divmod(of_one, at_once)
        return whole * together(costs[0], at_once) + (together(costs[0], rest) if rest else 0.0), waves
    slots = [0.0] * min(total, device.processors * at_once)
    for count, each in zip(counts, costs, strict=True):
        for _ in range(count):
            heapq.heapreplace(slots, slots[0] + together(each, at_once))
    return max(slots), waves


def rereads(role: Role, at_once: int, lru: _LRU) -> int:
    """Bytes that programs find no longer in L2 though others have read them, `at_once` running side by side."""
    everything = sum(panel.bytes * panel.count for panel in role.panels)
    missed = 0
    if everything <= lru.size:  # type: ignore[attr-defined]
        return 0
    for first in range(0, role.programs, at_once):
        wave = range(first, min(first + at_once, role.programs))
        for step in (*range(STEPS), *(reversed(range(STEPS)) if role.back else ())):
            for program in wave:
                for number, panel in enumerate(role.panels):
                    missed += lru.use((number, panel.of(program) * STEPS + step), int(panel.bytes / STEPS))
    return max(0, missed - int(everything))


# The table


def _product(
    m: int, n: int, k: int, tile: tuple[int, int], factors: tuple[float, float], operand: Tensor, *, splits: int = 1,
    columns_first: bool = True,
) -> Role:  # fmt: skip
    """Programs of `[m, k] @ [k, n]`, a tile of the result each, or one of each split of k.

    Args:
        m, n, k: the product's sizes.
        tile: rows and columns of a program's tile.
        factors: bytes of an element of either factor.
        operand: whose dtype decides how it is multiplied: float32 as six products of bfloat16 parts.
        splits: of k; the slowest of the program ids.
        columns_first: whether programs go through the tiles of a row first.
    """
    rows, columns = -(-m // tile[0]), -(-n // tile[1])
    depth = k / splits

    def place(program: int) -> tuple[int, int, int]:
        split, within = divmod(program, rows * columns)
        row, column = divmod(within, columns) if columns_first else divmod(within, rows)[::-1]
        return row, column, split

    left = Panel(tile[0] * depth * factors[0], rows * splits, lambda p: place(p)[0] * splits + place(p)[2])
    right = Panel(tile[1] * depth * factors[1], columns * splits, lambda p: place(p)[1] * splits + place(p)[2])
    times = 6 if operand.dtype == torch.float32 else 1
    return Role(rows * columns * splits, times * 2.0 * tile[0] * tile[1] * depth, 0.0, (left, right))


def _sizes(launch: Launch, *names: str) -> tuple[Any, ...]:
    return tuple(launch.arguments[name] for name in names)


def _mixture_fwd(launch: Launch) -> list[Role]:
    s, k, a, codebook, logits = _sizes(launch, "num_sentences", "num_actions", "size", "codebook", "logits")
    if codebook is None:
        return [Role(math.prod(launch.grid), read=logits.numel() * logits.itemsize / math.prod(launch.grid))]
    tile = launch.tiles.rows, launch.tiles.columns
    factors = logits.itemsize, codebook.itemsize
    return [_product(s, a, k, tile, factors, codebook, splits=launch.grid[2])]


def _add_plan_bwd(launch: Launch) -> list[Role]:
    grad, bounds = _sizes(launch, "grad", "bounds")
    windows = len(grad) / (len(bounds) - 1) / launch.tiles.rows  # of tokens
    steps, most = max(1.0, windows), max(1.0, LONGEST_SENTENCE * windows)
    return [Role(math.prod(launch.grid), iterations=(steps,), longest=most / steps)]


def _over_rows(*names: str) -> Callable[[Launch], list[Role]]:
    """Programs that go over rows of matrices `[S, K]` of these names, and back."""

    def roles(launch: Launch) -> list[Role]:
        count = math.prod(launch.grid)
        matrices = [launch.arguments[name] for name in names if launch.arguments[name] is not None]
        panels = tuple(Panel(each.numel() * each.itemsize / count, count, lambda p: p) for each in matrices)
        steps = -(-launch.arguments["num_actions"] // launch.tiles.columns)
        return [Role(count, panels=panels, iterations=(steps,), back=True)]

    return roles


def _cross_entropy(launch: Launch) -> list[Role]:
    logits, count = launch.arguments["inout_logits"], launch.grid[0]
    row = launch.arguments["size"] * logits.itemsize
    return [Role(count, read=row, panels=(Panel(row, count, lambda p: p),), back=True)]


def _combine_fwd(launch: Launch) -> list[Role]:
    return [Role(math.prod(launch.grid), iterations=(launch.arguments["num_splits"],))]


def _sentences_bwd(launch: Launch) -> list[Role]:
    return [Role(math.prod(launch.grid), iterations=(-(-launch.arguments["size"] // launch.tiles.columns),))]


def _logits_bwd(launch: Launch) -> list[Role]:
    s, k, a, upstream, codebook = _sizes(launch, "num_sentences", "num_actions", "size", "grad_mixture", "codebook")
    if upstream is None:
        return [Role(launch.grid[0])]
    tile = launch.tiles.rows, launch.tiles.depth
    return [_product(s, k, a, tile, (upstream.itemsize, codebook.itemsize), upstream)]


def _codebook_bwd(launch: Launch) -> list[Role]:
    s, k, a, upstream, logits = _sizes(launch, "num_sentences", "num_actions", "size", "grad_mixture", "logits")
    tile = launch.tiles.rows, launch.tiles.columns
    return [_product(k, a, s, tile, (logits.itemsize, upstream.itemsize), upstream)]


KERNELS: dict[str, Callable[[Launch], list[Role]]] = {
    "cross_entropy": _cross_entropy,
    "softmax_fwd": _over_rows("logits", "noise"),
    "softmax_bwd": _over_rows("logits", "noise", "grad_probabilities"),
    "combine_fwd": _combine_fwd,
    "sentences_bwd": _sentences_bwd,
    "logits_bwd": _logits_bwd,
    "codebook_bwd": _codebook_bwd,
    "mixture_fwd": _mixture_fwd,
    "add_plan_bwd": _add_plan_bwd,
}
"""The roles of a launch, by kernel."""

GATHERED = {
    ("combine_fwd", "codebook"): "num_sentences",
    ("sentences_bwd", "codebook"): "num_sentences",
}
"""Matrices of which a kernel reads some rows only: as many as this argument says, at most."""
