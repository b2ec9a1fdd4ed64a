"""What a JSON value has to look like before it is shown: files of a run may come from anybody."""

from __future__ import annotations

import math
from typing import Any

_LARGEST_COUNT = 2**53
"""Whole numbers that float64 holds one by one."""

_WORDS: dict[Any, str] = {
    str: "a text", int: "a count", float: "a finite number", None: "null", list: "a list", dict: "an object",
}  # fmt: skip


def misfit(value: Any, shape: Any, where: str = "") -> str | None:
    """What is wrong with a value, in words; None where it has the shape.

    Args:
        value: as `json.loads` makes it.
        shape: `str`; `int`, a whole number from 0 to 2^53; `float`, any finite number; None; `[shape]`, a list of such;
            a dict of shapes by key, in which "key?" may be missing and "*" stands for every key; a tuple of
            alternatives, the last of which is what an error speaks of.
        where: the path to the value, for the error.
    """
    if isinstance(shape, tuple):
        faults = [misfit(value, one, where) for one in shape]
        return None if None in faults else faults[-1]
    kind = type(shape) if isinstance(shape, list | dict) else shape
    if not _is(value, kind):
        return f"{where + ': ' if where else ''}expected {_WORDS[kind]}, got {_shown(value)}"
    if isinstance(shape, list):
        inner = [(f"{where}[{number}]", item, shape[0]) for number, item in enumerate(value)]
    elif isinstance(shape, dict):
        inner = []
        for key, part in shape.items():
            name = key.removesuffix("?")
            for found in value if key == "*" else (name,):
                if found in value:
                    inner.append((f"{where}.{found}" if where else found, value[found], part))
                elif name == key:
                    return f"{where + ': ' if where else ''}no {key!r}"
    else:
        return None
    return next((fault for at, item, part in inner if (fault := misfit(item, part, at)) is not None), None)


def _is(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind not in (int, float):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if kind is int:
        return isinstance(value, int) and 0 <= value <= _LARGEST_COUNT
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False


def _shown(value: Any) -> str:
    """A value in a few characters."""
    if isinstance(value, dict | list):
        return _WORDS[type(value)]
    text = "a number too large" if isinstance(value, int) and abs(value) > _LARGEST_COUNT else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
