"""The two ways a command can end badly: the user's input is wrong, or the machine failed."""

from __future__ import annotations

import errno
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input or usage: one line that names the file, row or argument and says what to do."""

    status = 2
    """Exit status of the program."""


class MachineError(RuntimeError):
    """The machine failed (disk full, no memory): one line that says what happened."""

    status = 1
    """Exit status of the program."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it: Rust and C++ libraries wrap the system's in exceptions of their own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def machine_failure(raised: BaseException, options: set[str]) -> str | None:
    """One line for an error that is the machine's, None for any other; `options` are those that its advice may name."""
    for error in causes(raised):
        text = str(error).strip()
        if isinstance(error, MachineError):
            return text
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if is_full or "No space left on device" in text or "File too large" in text:
            file = getattr(error, "filename", None)
            where = f" for {file}" if file else ""
            again = " with --resume" if "--resume" in options else ""
            return f"no space left on the disk{where}; free some and start again{again}"
        if (
            isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in text
        ):
            less = [option for option in ("--batch-size", "--window", "--shard-documents") if option in options]
            return f"out of memory; a smaller {', '.join(less) or 'model or input'} needs less"
        is_plain = isinstance(error, BrokenPipeError) or type(error) is OSError
        if isinstance(error, OSError) and is_plain and error.errno is not None:  # input or output failed
            return f"{error.filename or 'the system'}: {error.strerror}"
    return None
