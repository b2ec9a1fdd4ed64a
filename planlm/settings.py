"""What a setting can be: its kind, and its range. Standard library only, for `planlm --help`."""

from __future__ import annotations

import math
import os
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limit:
    """The numbers a setting can have: `holds` decides, `words` say so in the error, `most` is the largest."""

    words: str
    holds: Callable[[float], bool]
    most: float = math.inf

    def expected(self, value: float) -> str | None:
        """What is expected in place of `value`; None where it will do."""
        if not self.holds(value):
            return self.words
        return f"at most {self.most:,}" if value > self.most else None


def count(most: int = 1_000_000_000) -> Limit:
    """A number of things: at least one, and not so many that the machine would be at it for ever."""
    return Limit("at least 1", lambda value: value >= 1, most)


COUNT = count()
NOT_NEGATIVE = Limit("at least 0", lambda value: value >= 0)
NUMBER = Limit("at least 0", lambda value: value >= 0, 1_000_000_000)
POSITIVE = Limit("more than 0", lambda value: value > 0)
TEMPERATURE = Limit("1e-30 to 1e+30", lambda value: 1e-30 <= value <= 1e30)  # scores over it are finite in float32
EPOCHS = Limit("more than 0", lambda value: value > 0, 1_000_000)
BATCH = count(1_000_000)
TOKENS = count(1 << 24)  # of a window: no LM's context is longer
SEED = Limit("0 to 2147483647", lambda value: 0 <= value < 2**31)
SAMPLING = Limit("0, which is greedy, or at least 0.01", lambda value: value == 0 or value >= 0.01)
FRACTION = Limit("0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Limit("at least 0 and less than 1", lambda value: 0 <= value < 1)
FRACTION_NOT_ZERO = Limit("more than 0 and at most 1", lambda value: 0 < value <= 1)

KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    tuple: "a text, or a list of at least one",
}
"""Types of settings, in words."""


def kind_of(config_class: type, name: str) -> type:
    """int, float, bool, str or tuple: the type of a field without `| None` and element types."""
    hint = typing.get_type_hints(config_class)[name]
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_origin(hint) or hint


def as_kind(kind: type, value: Any) -> Any:
    """A value from Python or a file as a setting's type; what would change its meaning is refused.

    Scalars of NumPy and torch are numbers, paths are texts, one text is a list of one, and a text is the number that
    it spells: to YAML, 1e-3 is text.

    Raises:
        ValueError: "expected a whole number, got 2.5".
    """
    given = value
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        if kind is tuple:
            items = value if isinstance(value, list | tuple) else (value,)
            if items and all(isinstance(item, str | os.PathLike) for item in items):
                return tuple(_as_text(os.fspath(item)) for item in items)
        elif kind is bool and isinstance(value, bool):
            return value
        elif kind is str and (isinstance(value, str) or is_number):
            return _as_text(str(value))
        elif kind is float and (is_number or isinstance(value, str)):
            return float(value)
        elif kind is int and ((is_number and not isinstance(value, float)) or isinstance(value, str)):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"expected {KINDS[kind]}, got {shown(given)}")


def _as_text(text: Any) -> str:
    """Text that the system and a file can hold: no bytes, no NUL, no half of a pair of UTF-16."""
    if not isinstance(text, str) or "\0" in text:
        raise ValueError
    text.encode("utf-8")
    return text


def shown(value: Any) -> str:
    """A value in an error's one line."""
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except ValueError:  # Python does not spell a whole number of thousands of digits
        return "a number of thousands of digits"
    return " ".join(text.split()) if len(text) < 100 else " ".join(text[:97].split()) + "..."
