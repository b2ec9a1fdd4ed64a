"""Progress of long work on stderr: a bar in a terminal, a plain line now and then in a log file; memory in use."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from planlm.ranks import rank

Item = TypeVar("Item")

LOG_SECONDS = 10.0
"""Seconds between lines where stderr is no terminal."""


class Progress:
    """Counts units of work; use as a context manager.

    Args:
        description: what is being done, shown first.
        total: units in all, or None where unknown.
        unit: name of a unit, in the plural ("documents").
    """

    def __init__(self, description: str, total: int | None = None, unit: str = "steps") -> None:
        self.description, self.total, self.unit = description, total, unit
        self.count, self._before, self.note = 0, 0, ""
        self.started = self._last_line = time.monotonic()
        self._silent = rank() > 0  # one of several processes speaks for all
        disable = self._silent or not sys.stderr.isatty()
        self._bar = tqdm(desc=description, total=total, unit=f" {unit}", leave=False, disable=disable)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        elapsed = time.monotonic() - self.started
        if exception[0] is None and elapsed > 2:
            done = self.count - self._before
            self._tell(f"{done:,} {self.unit} in {elapsed:.0f} s ({done / elapsed:,.1f}/s)")

    def start_at(self, count: int) -> None:
        """So many units were done before: they count, but not in the rate."""
        self.count = self._before = self._bar.initial = self._bar.n = count
        self._bar.refresh()

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Report `amount` units done; `note` (say, a loss) stands behind the count."""
        self.count += amount
        if note:
            self.note = note
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(amount)
        if self._bar.disable and time.monotonic() - self._last_line > LOG_SECONDS:
            self._last_line = time.monotonic()
            of = f" of {self.total:,} ({100 * self.count / self.total:.0f} %)" if self.total else ""
            self._tell(f"{self.count:,}{of} {self.unit}")

    def _tell(self, text: str) -> None:
        self.line(f"{self.description}: {text} {self.note}".rstrip())

    def line(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if not self._silent:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()


def track(items: Iterable[Item], description: str, total: int | None = None, unit: str = "steps") -> Iterator[Item]:
    """Iterate over `items` and report each as one unit of progress."""
    with Progress(description, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def process_memory(field: str) -> int | None:
    """Bytes of `VmRSS` (resident now), `VmHWM` (at the peak) or another field of proc(5)'s status; None without one.

    getrusage's peak is of no use: a process inherits its parent's.
    """
    status = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) * 1024 if found else None
