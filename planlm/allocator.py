"""Tell glibc's malloc to keep the memory it has."""

from __future__ import annotations

import ctypes
import platform

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_memory() -> bool:
    """Stop malloc from returning freed blocks to the system; nothing happens where the C library is not glibc.

    By default glibc maps every block over 32 MiB afresh and unmaps it when it is freed, and trims its heap. A training
    step allocates the same activations and gradients each time, so it pays for zeroed pages again and again. A
    three-layer transformer of width 768 made 1.2 million page faults in 9 steps and took 1.6 s of processor time a
    step; with this setting 0.3 million and 1.4 s. The peak of resident memory rose from 1.12 to 1.25 GiB.

    Returns:
        True where the setting is in force.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # No block is mapped for itself, and the heap is never trimmed (-1 is mallopt's word for "never").
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
