"""GPUs that `benchmarks.predict` knows: what their data sheets say, and what of it large copies and products reach.

Every figure has a source. What is neither in a data sheet nor measured is assumed, and says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, eq=False)
class Device:
    """One GPU.

    Attributes:
        name (str): as NVIDIA has it.
        architecture (int): compute capability, which kernels are compiled for.
        tables (int): the architecture whose tiles the kernels take there.
        processors (int): multiprocessors (SMs).
        clock (float): cycles a second while all of them multiply.
        products (dict[str, float]): FLOP/s of a large square product by "bf16", "tf32" and "float32" (no tensor cores).
        tensor (dict[str, float]): FLOPs a cycle of one SM's tensor cores in compiled code, by "bf16" and "tf32".
        copies (float): bytes/s of a large copy, read and written.
        l2_bytes, l2_rate (float): the L2 cache, and bytes/s that all SMs together read from it.
        latency (float): cycles from a load to its value, where that lies in DRAM.
        shared (int): shared memory of an SM, in bytes; a program takes 1 KiB more than it asks for.
        block_shared (int): most that one program may ask for.
        warps, blocks (int): most of an SM.
        sources (dict[str, str]): where the figures come from.
    """

    name: str
    architecture: int
    tables: int
    processors: int
    clock: float
    products: dict[str, float]
    tensor: dict[str, float]
    copies: float
    l2_bytes: float
    l2_rate: float
    latency: float
    shared: int
    block_shared: int
    warps: int
    blocks: int
    sources: dict[str, str] = field(repr=False)

    registers = 65536
    """Of an SM, given to warps by the 256."""

    sm_bytes = 64.0
    """Bytes a cycle that one SM takes from L2 (NVIDIA's white papers on GA100 and GH100)."""


_COMMON = {
    "tensor": "data sheet: dense rate / SMs / boost clock",
    "l2_rate": "assumed: what microbenchmarks of the chip or its sisters show",
    "latency": "assumed: what microbenchmarks show, rounded",
    "shared, warps, blocks": "CUDA C++ Programming Guide, compute capabilities",
}

DEVICES = {
    "a100": Device(
        name="A100 80GB SXM",
        architecture=80,
        tables=80,
        processors=108,
        clock=1.41e9,
        products={"bf16": 268e12, "tf32": 134e12, "float32": 18.1e12},
        tensor={"bf16": 2048, "tf32": 1024},
        copies=1.75e12,
        l2_bytes=40e6,
        l2_rate=4.5e12,
        latency=570,
        shared=164 << 10,
        block_shared=163 << 10,
        warps=64,
        blocks=32,
        sources=_COMMON
        | {
            "clock": "data sheet: boost",
            "products": "assumed: .86 (bf16, tf32) and .93 (float32) of the data sheet's 312, 156 and 19.5 TFLOP/s",
            "copies": "assumed: .86 of the data sheet's 2.04 TB/s",
            "l2_bytes": "data sheet",
        },
    ),
    "h100": Device(
        name="H100 80GB SXM",
        architecture=90,
        tables=90,
        processors=132,
        clock=1.75e9,
        products={"bf16": 798e12, "tf32": 400e12, "float32": 52e12},
        tensor={"bf16": 4096, "tf32": 2048},
        copies=3.0e12,
        l2_bytes=50e6,
        l2_rate=7.0e12,
        latency=620,
        shared=228 << 10,
        block_shared=227 << 10,
        warps=64,
        blocks=32,
        sources=_COMMON
        | {
            "clock": "assumed: under load, of the data sheet's 1.83 to 1.98 GHz",
            "products": "bf16 measured on one H100 (8192³); assumed: .81 of 494 TFLOP/s (tf32), .78 of 67 (float32)",
            "copies": "measured on one H100, of the data sheet's 3.35 TB/s",
            "l2_bytes": "data sheet; both partitions together",
        },
    ),
    "rtx4090": Device(
        name="RTX 4090",
        architecture=89,
        tables=80,
        processors=128,
        clock=2.52e9,
        products={"bf16": 157e12, "tf32": 78e12, "float32": 58e12},
        tensor={"bf16": 512, "tf32": 256},
        copies=0.92e12,
        l2_bytes=72e6,
        l2_rate=5.0e12,
        latency=600,
        shared=100 << 10,
        block_shared=99 << 10,
        warps=48,
        blocks=24,
        sources=_COMMON
        | {
            "clock": "data sheet: boost",
            "products": "assumed: .95 (bf16, tf32) and .7 (float32) of the data sheet's 165, 82.6 and 82.6 TFLOP/s",
            "copies": "assumed: .91 of the data sheet's 1.01 TB/s",
            "l2_bytes": "data sheet",
        },
    ),
}
"""By the name that the command takes."""

DEVICES["h200"] = replace(
    DEVICES["h100"],
    name="H200 141GB SXM",
    products={"bf16": 771e12, "tf32": 405e12, "float32": 51e12},
    copies=4.26e12,
    l2_bytes=60e6,
    sources=DEVICES["h100"].sources
    | {
        "products": "measured on one H200 (8192³)",
        "copies": "measured on one H200, of the data sheet's 4.8 TB/s",
        "l2_bytes": "as the driver says; both partitions together",
    },
)
"""The same chip with other memory."""


def known_device(name: str) -> Device | None:
    """The device of a name that CUDA gives, as "NVIDIA H100 80GB HBM3"."""
    words = {"A100": "a100", "H100": "h100", "H200": "h200", "RTX 4090": "rtx4090"}
    return next((DEVICES[key] for word, key in words.items() if re.search(rf"\b{word}\b", name)), None)
