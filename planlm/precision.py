"""Which arithmetic a device is fast at, found out and never assumed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from planlm.ranks import local_rank

CPU = torch.device("cpu")


def device() -> torch.device:
    """The device that work runs on: this process's CUDA device (the first without torchrun), else the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else CPU


def has_fast_bf16(where: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware: Ampere and later, AVX512-BF16 or AMX processors."""
    if where.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu_info = Path("/proc/cpuinfo")
    text = cpu_info.read_text() if cpu_info.exists() else ""
    return "avx512_bf16" in text or "amx_bf16" in text


def compute_dtype(precision: str, where: torch.device) -> torch.dtype:
    """dtype of matrix products for `--precision auto|bf16|fp32`."""
    fast = precision == "bf16" or (precision == "auto" and has_fast_bf16(where))
    return torch.bfloat16 if fast else torch.float32


def autocast(precision: str, where: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast context of a precision; does nothing for float32."""
    dtype = compute_dtype(precision, where)
    return torch.autocast(where.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
