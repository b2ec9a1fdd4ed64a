"""What the program shows: nothing acts on the terminal, no lost message stops the work, and libraries keep quiet."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import warnings

from planlm.ranks import rank

_ACTS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|(?<!^)\r(?!\n|$)")
"""Control characters, among them those that begin a terminal's commands, and those that change the order of text."""

_PLAIN = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-"})
"""What tables are shown with where an encoding lacks their signs."""

_SWITCHES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TORCH_LOGS": "-all",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
"""Variables by which libraries are told to show errors alone, and no bars."""


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


def note(text: str) -> None:
    """A line on stderr for whoever waits."""
    print(text, file=sys.stderr, flush=True)


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


def silence_libraries() -> None:
    """Keep libraries' warnings and bars off the screen unless PLANLM_VERBOSE is set; PlanLM shows its own progress.

    Each by its own switch and never all at once: what PlanLM has to say ("the eager reference runs instead"), and what
    transformers says of weights that do not fit, reach the screen. Of several processes the first one speaks.
    """
    if os.environ.get("PLANLM_VERBOSE"):
        return
    for variable, value in _SWITCHES.items():
        os.environ.setdefault(variable, value)
    logging.getLogger().setLevel(logging.ERROR)  # of all that set none of their own
    logging.getLogger("planlm").setLevel(logging.WARNING if rank() == 0 else logging.ERROR)
    weights = logging.getLogger("transformers.modeling_utils")
    weights.setLevel(logging.WARNING)
    weights.addFilter(_is_of_weights)
    warnings.simplefilter("ignore")


def _is_of_weights(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or "LOAD REPORT" in record.getMessage()
