"""What every command takes, how an option is declared, and what several commands offer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from planlm.errors import InputError
from planlm.settings import Limit, as_kind, kind_of, shown

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_LM = "HuggingFaceTB/SmolLM2-135M-Instruct"

CONDITIONINGS = ("adapter", "embedding", "insert", "bottleneck")
"""How a plan can enter the LM, see docs/method.md; `bottleneck` is the control that has none."""

PLANNER_INPUTS = ("embeddings", "lm", "both")
"""What the planner can read of a sentence, see docs/method.md."""


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None, limit: Limit | None = None) -> Any:
    """A dataclass field that is also a flag: `help` is shown by `--help`, with the default behind it."""
    return field(default=default, metadata={"help": help, "choices": choices, "limit": limit, "positional": False})


def required(help: str, *, positional: bool = False) -> Any:
    """A field without a default: the command line asks for it."""
    return field(metadata={"help": help, "choices": None, "limit": None, "positional": positional})


@dataclass(frozen=True, kw_only=True)
class CommandConfig:
    """What every command takes. Values become the fields' types, whoever gives them: see `as_kind`.

    Raises:
        InputError: values that cannot be, all of them in one line.
    """

    json: bool = option(False, "print the result on stdout as one JSON object")

    def __post_init__(self) -> None:
        problems = []
        for setting in fields(self):
            value, choices, limit = getattr(self, setting.name), setting.metadata["choices"], setting.metadata["limit"]
            flag = setting.name if setting.metadata["positional"] else "--" + setting.name.replace("_", "-")
            if value is None and "None" in str(setting.type):
                continue
            try:
                value = as_kind(kind_of(type(self), setting.name), value)
            except ValueError as error:
                problems.append(f"{flag}: {error}")
                continue
            object.__setattr__(self, setting.name, value)
            if choices and value not in choices:
                problems.append(f"{flag} {value}: expected one of {', '.join(choices)}")
            elif isinstance(value, float) and not math.isfinite(value):
                problems.append(f"{flag} {value}: expected a finite number")
            elif limit and (expected := limit.expected(value)):
                problems.append(f"{flag} {shown(value)}: expected {expected}")
        if problems:
            raise InputError("; ".join(problems))
