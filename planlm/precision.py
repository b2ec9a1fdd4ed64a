"""What a device is, which arithmetic it is fast at and how fast: found out and never assumed."""

from __future__ import annotations

import contextlib
import platform
import time
from pathlib import Path

import torch

from planlm.kernels.cpp import fast_bf16
from planlm.ranks import local_rank

CPU = torch.device("cpu")


def device() -> torch.device:
    """The device that work runs on: this process's CUDA device (the first without torchrun), else the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else CPU


def device_name(where: torch.device) -> str:
    """The name that the maker gave the GPU, or the processor."""
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def has_fast_bf16(where: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware: Ampere and later, processors with AVX512-BF16."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if where.type == "cuda" else fast_bf16()


def matrix_product_rate(dtype: torch.dtype, where: torch.device, size: int | None = None) -> float:
    """FLOP/s of a square matrix product: the best of a few, in under a second.

    Args:
        dtype: of the matrices.
        where: the device.
        size: rows of the matrices; by default 8,192 on CUDA and 2,048 elsewhere, large enough for the best.
    """
    size = size or (8192 if where.type == "cuda" else 2048)
    left, right = torch.randn(2, size, size, device=where).to(dtype).unbind()
    out = torch.empty_like(left)  # or fresh pages would be timed as well
    best = float("inf")
    for _ in range(6):
        _synchronize(where)
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        _synchronize(where)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _synchronize(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def compute_dtype(precision: str, where: torch.device) -> torch.dtype:
    """dtype of matrix products for `--precision auto|bf16|fp32`."""
    fast = precision == "bf16" or (precision == "auto" and has_fast_bf16(where))
    return torch.bfloat16 if fast else torch.float32


def autocast(precision: str, where: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast context of a precision; does nothing for float32."""
    dtype = compute_dtype(precision, where)
    return torch.autocast(where.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
