"""Tell glibc's malloc to keep the memory it has."""

from __future__ import annotations

import ctypes
import platform
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
