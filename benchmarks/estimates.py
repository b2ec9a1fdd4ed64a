"""How long a counted kernel takes on a device: the longest of what it needs, and its launch.

- **DRAM**: what it reads and is not in L2, what its programs read again after it has been put out of L2 (`rereads`),
  and what it writes, at the rate of a large copy. L2 is a least-recently-used cache of the device's size, over all
  kernels of a run in order.
- **L2** (PlanLM's kernels): all that the programs' load instructions ask for, at L2's rate.
- **SM** (PlanLM's kernels): programs in whole waves; the programs that an SM holds at a time take as long as the one of
  them alone, or as their issue slots, tensor cores or loads take together (`machine_code`).
- **products** (the library's): of all tiles and split-K, the fastest, each at its stated share of the rate of a large
  square product, in whole waves; it may read as often from L2 as it likes. All in cuBLAS's favour.
- **attention**: FLOPs at a stated share of that rate.

A launch costs `GAP` on top, and `RAMP` where machine code does not say how long a kernel takes to get going.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from benchmarks import programs
from benchmarks.devices import Device
from benchmarks.machine_code import code_of
from benchmarks.operators import Kernel, Part, Product

if TYPE_CHECKING:
    from planlm.kernels.triton_launch import Launch

GAP, RAMP = 2e-6, 1e-6
"""Seconds between the kernels of a stream, and of one kernel from its first load to its first result: assumed. Together
3 µs, what profiles show of a kernel with next to nothing to do."""

TILES = {
    (128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.95, (64, 256): 0.9, (256, 64): 0.9, (128, 64): 0.8, (64, 128): 0.8,
    (64, 64): 0.65, (128, 32): 0.5, (32, 128): 0.5, (64, 32): 0.4, (32, 64): 0.4, (32, 32): 0.25,
}  # fmt: skip
"""cuBLAS's tiles and the share of a large product's rate that their loops reach: assumed, after CUTLASS's profiles."""

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Parts of the summed dimension that cuBLAS may give to different programs."""

SPLIT_SECONDS = 1e-6
"""What adding the parts up costs beside their bytes: assumed."""

ATTENTION = {
    80: {"flash": (0.60, 0.48), "efficient": (0.35, 0.22)},
    89: {"flash": (0.75, 0.60), "efficient": (0.45, 0.30)},
    90: {"flash": (0.40, 0.33), "efficient": (0.22, 0.14)},
}
"""Shares of a large product's rate by architecture, forward and backward: assumed. `flash`: FlashAttention-2 as
torch has it (arXiv:2307.08691, figures 4 to 7, causal, 1,024 to 2,048 positions); `efficient`: CUTLASS's, biased."""

BASIS = {
    "dram": "counted", "l2": "compiled", "sm": "compiled", "product": "assumed", "attention": "assumed",
    "launch": "assumed",
}  # fmt: skip
"""What a component comes from, beside the device's rates: sizes of tensors, machine code, or a stated efficiency."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of a kernel.

    Attributes:
        kernel (Kernel): as counted.
        launch (float): of its launches.
        needs (dict[str, float]): seconds of each thing it needs.
        waves (float): in which the SMs run its programs; 0 where that is not looked at.
        detail (str): registers, shared memory and programs, for people.
    """

    kernel: Kernel
    launch: float
    needs: dict[str, float]
    waves: float = 0.0
    detail: str = ""

    @property
    def bound(self) -> str:
        """What it needs longest."""
        return max(self.needs, key=self.needs.__getitem__)

    @property
    def seconds(self) -> float:
        """Launch and the longest need."""
        return self.launch + max(self.needs.values())


class Cache:
    """Which parts of memory lie in L2: the least recently used leave it. In chunks of 512 KiB."""

    CHUNK = 1 << 19

    def __init__(self, size: float) -> None:
        self.size, self.used = size, 0
        self._chunks: OrderedDict[tuple[int, int], int] = OrderedDict()

    def touch(self, parts: Sequence[Part]) -> list[int]:
        """Use parts, side by side from their beginnings on; returns the bytes of each that were not there."""
        missed = [0] * len(parts)
        ways = {number: self._chunks_of(part) for number, part in enumerate(parts)}
        while ways:
            for number, way in list(ways.items()):
                if (chunk := next(way, None)) is None:
                    del ways[number]
                else:
                    missed[number] += self.use(*chunk)
        return missed

    def use(self, key: tuple[int, int], size: int) -> int:
        """Use a chunk; returns the bytes of it that were not there."""
        before = self._chunks.pop(key, 0)
        self._chunks[key] = max(size, before)
        self.used += max(size - before, 0)
        while self.used > self.size and len(self._chunks) > 1:
            self.used -= self._chunks.popitem(last=False)[1]
        return max(size - before, 0)

    def _chunks_of(self, part: Part) -> Iterator[tuple[tuple[int, int], int]]:
        at, end = part.begin, part.begin + part.bytes
        while at < end:
            until = min(end, (at // self.CHUNK + 1) * self.CHUNK)
            yield (part.storage, at // self.CHUNK), until - at
            at = until


def estimates(kernels: Sequence[Kernel], device: Device) -> list[Estimate]:
    """Of kernels that run one after the other, with nothing in L2 at the start."""
    lru = Cache(device.l2_bytes)
    return [estimate(kernel, device, lru) for kernel in kernels]


def estimate(kernel: Kernel, device: Device, lru: Cache) -> Estimate:
    """Of one kernel, which leaves in `lru` what it has touched."""
    missed = lru.touch((*kernel.reads, *kernel.writes))[: len(kernel.reads)]
    moved = sum(missed) + sum(part.bytes for part in kernel.writes)
    needs = {"dram": moved / device.copies}
    if kernel.launch is not None:
        return _of_triton(kernel, kernel.launch, device, moved)
    if kernel.product is not None:
        needs["product"] = product_seconds(kernel.product, device)
    if kernel.attention:
        kind, way = kernel.attention.split()
        share = ATTENTION[device.architecture][kind][way == "backward"]
        needs["attention"] = kernel.flops / (share * device.products["bf16"])
    return Estimate(kernel, kernel.launches * (GAP + RAMP), needs)


@cache
def product_seconds(product: Product, device: Device) -> float:
    """Of the library's product, without launch and DRAM: the fastest of all tiles and splits."""
    rate = device.products["float32" if product.dtype == torch.float32 else "bf16"] / device.processors
    found = []
    for (rows, columns), share in TILES.items():
        programs = product.batch * -(-product.m // rows) * -(-product.n // columns)
        for splits in SPLITS:
            depth = -(-product.k // splits // 32) * 32
            waves = -(-programs * splits // device.processors)
            seconds = waves * 2 * rows * columns * depth / (rate * share)
            if splits > 1:  # sums in float32, written and read in L2
                seconds += SPLIT_SECONDS + 8 * splits * product.batch * product.m * product.n / device.l2_rate
            found.append(seconds)
    return min(found)


def _of_triton(kernel: Kernel, launch: Launch, device: Device, moved: int) -> Estimate:
    roles, code = programs.roles_of(launch), code_of(launch, device)
    costs = [programs.cost(role, number, len(roles), code) for number, role in enumerate(roles)]
    resident = code.resident(device)
    again = sum(programs.rereads(role, device.processors * resident, Cache(device.l2_bytes)) for role in roles)
    asked = sum(role.programs * each.loaded for role, each in zip(roles, costs, strict=True))
    cycles, waves = programs.makespan([role.programs for role in roles], costs, resident, device)
    slowest = [programs.cost(role, number, len(roles), code, role.longest).alone for number, role in enumerate(roles)]
    cycles = max(cycles, *slowest)
    needs = {"dram": (moved + again) / device.copies, "l2": asked / device.l2_rate, "sm": cycles / device.clock}
    detail = (
        f"{sum(role.programs for role in roles)} programs, {resident} at a time, {code.registers} registers, "
        f"{code.shared >> 10} KB" + (f", {code.spilled} B spilled" if code.spilled else "")
    )
    return Estimate(kernel, GAP, needs, waves, detail)
