"""The standard streams of the program: nothing shown acts on the terminal, and no lost message stops the work."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys

_ACTS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|(?<!^)\r(?!\n|$)")
"""Control characters, among them those that begin a terminal's commands, and those that change the order of text."""

_PLAIN = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-"})
"""What tables are shown with where an encoding lacks their signs."""


def visible(text: str) -> str:
    r"""Text from documents, models and file names as it is safe to show: what acts on terminals as `\x1b` and so on."""
    return _ACTS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def encodable(text: str, encoding: str) -> str:
    r"""Text for a stream of this encoding: what that lacks becomes a plain sign, or `\u2026` and so on."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    return text


def open_streams() -> None:
    """Make the process's standard streams fit for use.

    The next file opened would take the place of a stream that the caller closed, and be written into: all are open from
    here on, stdout such that printing fails, since a result that nobody gets is a failure. stderr forgives.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # the system gives the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = _Errors(
        getattr(sys.stderr, "buffer", None) or os.fdopen(2, "wb", closefd=False),
        encoding=getattr(sys.stderr, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=True,
    )


class _Errors(io.TextIOWrapper):
    """A stream of messages: made visible, and lost where they cannot be written (full disk, reader gone)."""

    def write(self, text: str) -> int:
        """Write what can be written; never fails."""
        with contextlib.suppress(OSError):
            super().write(visible(text))
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed; never fails."""
        with contextlib.suppress(OSError):
            super().flush()
