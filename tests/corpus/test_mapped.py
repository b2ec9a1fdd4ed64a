"""Mapped files leave the process's memory, and what they hold stays readable."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from planlm.corpus.mapped import MappedFiles
from planlm.corpus.writing import read_arrow, write_arrow

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(path: Path) -> int:
    """KiB of a mapped file in this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


def test_released_pages_leave_and_come_back(tmp_path: Path) -> None:
    path, other = tmp_path / "numbers.arrow", tmp_path / "others.arrow"
    values = np.arange(1 << 20)
    for file in (path, other):
        write_arrow(file, pa.table({"values": values}))
    numbers, others = (read_arrow(file)["values"].chunk(0).to_numpy() for file in (path, other))
    files = MappedFiles([path, tmp_path / "none.arrow"])
    assert numbers.sum() == others.sum() == values.sum()
    assert resident(path) >= 8 << 10 and resident(other) >= 8 << 10
    files.release()
    assert resident(path) == 0 and resident(other) >= 8 << 10, "only the files that were given"
    np.testing.assert_array_equal(numbers, values)


def test_memory_that_can_be_written_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    np.arange(1 << 12).tofile(path)
    mine = np.memmap(path, dtype=np.int64, mode="c")  # changes are the process's own, and would be lost
    mine[:] = 7
    MappedFiles([path]).release()
    assert (mine == 7).all()
