"""Memory-mapped files of a corpus: pages that were read are given back, so memory does not grow with the corpus."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path


class MappedFiles:
    """Files that this process has mapped for reading.

    Pages of a mapped file count as the process's memory until the system needs them elsewhere; a training run over a
    large corpus would look as if it grew without end, and be killed for it where memory is limited by a container.

    Args:
        paths: the files; those that are not mapped are passed over.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        files = {str(Path(path).resolve()) for path in paths}
        self._ranges: list[tuple[int, int]] = []  # address and bytes
        try:
            lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
        except OSError:  # no Linux: nothing is given back
            return
        for line in lines:
            fields = line.split(maxsplit=5)  # addresses, permissions, offset, device, inode, path
            # In memory that can be written, what was would be lost.
            if len(fields) == 6 and "w" not in fields[1] and fields[5] in files:
                begin, end = (int(address, 16) for address in fields[0].split("-"))
                self._ranges.append((begin, end - begin))
        self._madvise = ctypes.CDLL(None).madvise
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def release(self) -> None:
        """Take all pages out of this process's memory; they stay in the system's cache and come back when read."""
        for address, size in self._ranges:
            self._madvise(address, size, mmap.MADV_DONTNEED)
