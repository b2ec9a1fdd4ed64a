"""The two ways a command can end badly: the user's input is wrong, or the machine failed."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input or usage: one line that names the file, row or argument and says what to do."""

    status = 2
    """Exit status of the program."""


class MachineError(RuntimeError):
    """The machine failed (disk full, no memory): one line that says what happened."""

    status = 1
    """Exit status of the program."""
