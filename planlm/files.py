"""Writing files that are never seen half-written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when all of it is on the disk, and goes away on any failure."""
    beside = path.with_name(f"{path.name}.partial")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: whoever reads it sees the old or the new text, never half of one."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def is_utf8(text: str) -> bool:
    """Whether a name or argument from the system can be written as UTF-8 (Python keeps other bytes as surrogates)."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
