"""The environment variables that the operations read, all of them.

| variable | meaning | default |
|---|---|---|
| `PLANLM_BACKEND` | force one backend: triton, cpp or reference | the fastest that can run a call |
| `PLANLM_CACHE` | folder for compiled operators, tuned tiles and what else is made once | `~/.cache/planlm` |
| `PLANLM_TUNE` | 1: measure the Triton kernels' tiles at first use and keep the best | off: the tables |
| `CXX` | C++ compiler | c++ |
| `TRITON_INTERPRET` | Triton's own: 1 runs its kernels on CPU tensors, for tests | off |
| `ATEN_CPU_CAPABILITY` | torch's own: avx512, avx2 or default; the C++ operators follow it | what is there |
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path


def backend() -> str | None:
    """The backend that the user forces for the process."""
    return os.environ.get("PLANLM_BACKEND") or None


def cache() -> Path:
    """The folder for what is made once and used again."""
    return Path(os.environ.get("PLANLM_CACHE") or Path.home() / ".cache" / "planlm").expanduser()


def tune() -> bool:
    """Whether tiles are measured rather than looked up."""
    return os.environ.get("PLANLM_TUNE", "") not in ("", "0")


def interpreted() -> bool:
    """Whether Triton runs in its interpreter; it looks once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def compiler() -> str:
    """The C++ compiler's command."""
    return os.environ.get("CXX") or "c++"


def compiler_program(default: str = "c++") -> str | None:
    """Where the program is that this command begins with, or None; torch takes an empty `CXX` for a command, too.

    Args:
        default: what is called where `CXX` is not set.
    """
    try:
        command = shlex.split(os.environ.get("CXX", default))
    except ValueError:  # a quotation that does not end
        return None
    return shutil.which(command[0]) if command else None
