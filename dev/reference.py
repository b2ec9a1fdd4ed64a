"""docs/commands.md and docs/api.md, made from the code: `python -m dev.reference`, a part of `make docs`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import planlm
from planlm import arguments, cli

DOCS = Path(__file__).parents[1] / "docs"

COMMANDS_HEAD = """\
# Commands

<!-- Made by `make docs` from planlm/config/ and planlm/cli.py: change those. -->

`planlm COMMAND --help` says the same. Every command also takes `--config FILE`, a YAML file with any of its settings by
the same names, over which flags win, and `--json`, which prints the result as one JSON object. A switch is turned off
by `--no-` before its name. Results go to stdout; progress, warnings and errors go to stderr.

| exit status | |
|---|---|
| 0 | done |
| 1 | the machine failed, or the command was interrupted; what is finished is kept |
| 2 | wrong usage or input: one line names the file, row or argument ([what to do](troubleshooting.md)) |

| command | what it does |
|---|---|
"""
API_HEAD = """\
# Python interface

<!-- Made by `make docs` from the docstrings: change those. -->

[From Python](python.md) shows it at work.
"""
PUBLIC = {
    "The commands as functions": [f"planlm:{name}" for name in planlm.__all__],
    "A prepared corpus": [
        "planlm.corpus.store:PreparedCorpus",
        "planlm.corpus.store:PreparedCorpus.load",
        "planlm.corpus.store:PreparedCorpus.split",
        "planlm.corpus.batches:PlanLoader",
        "planlm.corpus.collator:PlanCollator",
    ],
    "The model": [
        "planlm.model:PlanLMForCausalLM",
        "planlm.model:PlanLMForCausalLM.from_lm",
        "planlm.model:PlanLMForCausalLM.forward",
        "planlm.model.tracking:SentenceTracker",
    ],
    "The plan operations": [
        "planlm.kernels:plan_projection",
        "planlm.kernels:plan_projection_from_hidden",
        "planlm.kernels:add_plan",
        "planlm.kernels:StackedPlan",
        "planlm.kernels:use_backend",
    ],
    "Errors": ["planlm.errors:InputError", "planlm.errors:MachineError"],
}
"""What docs/api.md describes, by heading."""
UNSHOWN = 1_000_000_000
"""A largest value from which on it says no more than that 32 bits hold it."""
MOST_PARAMETERS = 12
"""Of a signature that is shown: a function with more has a command's options, which docs/commands.md explains."""


def commands() -> str:
    """The text of docs/commands.md."""
    about = {name: (command.config.__doc__ or "").splitlines()[0] for name, command in cli.COMMANDS.items()}
    index = "".join(f"| [`{name}`](#{name}) | {line} |\n" for name, line in about.items())
    return COMMANDS_HEAD + index + "".join(_command(name, about[name]) for name in about)


def _command(name: str, about: str) -> str:
    command = cli.COMMANDS[name]
    shared = " Several processes can share it ([how](run.md#several-processes))." if command.distributed else ""
    fields = {field.name: field for field in dataclasses.fields(command.config) if field.name != "json"}
    actions = [action for action in arguments._build(command.config, "", "")._actions if action.dest in fields]
    actions.sort(key=lambda action: fields[action.dest].default is not dataclasses.MISSING)  # what is required first
    rows = "".join(_row(action, fields[action.dest]) for action in actions)
    table = f"\n| option | default | range | what it is |\n|---|---|---|---|\n{rows}" if rows else ""
    return f"\n## {name}\n\n{about}{shared}\n\n```sh\n{command.example}\n```\n{table}"


def _row(action: argparse.Action, field: dataclasses.Field[Any]) -> str:
    """A line of a command's table."""
    value = "" if action.nargs == 0 or action.choices else str(action.metavar)
    shown = " ".join(filter(None, [*action.option_strings[:1], value]))
    if field.default is dataclasses.MISSING:
        default = "required"
    elif isinstance(field.default, bool):
        default = ("no", "yes")[field.default]
    else:
        default = "" if field.default is None else f"`{field.default}`"
    limit, words = field.metadata["limit"], ", ".join(f"`{choice}`" for choice in field.metadata["choices"] or ())
    if limit:
        words = limit.words + (f", at most {limit.most:,}" if limit.most < UNSHOWN else "")
    about = re.sub(r"([|*<])", r"\\\1", field.metadata["help"])
    return f"| `{shown}` | {default} | {words.replace('at least 1, at most', '1 to')} | {about} |\n"


def api() -> str:
    """The text of docs/api.md."""
    return API_HEAD + "".join(
        f"\n## {heading}\n" + "".join(map(_described, names)) for heading, names in PUBLIC.items()
    )


def _described(place: str) -> str:
    """A class or function: heading, signature and docstring."""
    thing, (module, _, name) = pkgutil.resolve_name(place), place.partition(":")
    shown = "" if isinstance(thing, type) and issubclass(thing, Exception) else _signature(thing)
    if len(shown) > 70:  # a parameter a line
        shown = re.sub(r"(\(|, )(?=\*|\w+: )", lambda found: f"{found[1].strip()}\n    ", shown).replace(
            ") -> ", "\n) -> "
        )
    return f"\n### {name}\n\n```py\n{module}.{name}{shown}\n```\n\n{_markdown(inspect.getdoc(thing) or '')}\n"


def _signature(thing: Any) -> str:
    signature = inspect.signature(thing)
    if len(signature.parameters) > MOST_PARAMETERS:
        return "(...)"
    named = [each for name, each in signature.parameters.items() if name != "self"]
    bare = [each.replace(annotation=_Bare(each.annotation)) for each in named]
    return str(signature.replace(parameters=bare, return_annotation=_Bare(signature.return_annotation)))


class _Bare(str):
    """An annotation as it is written, without quotes around it."""

    __repr__ = str.__str__


def _markdown(docstring: str) -> str:
    """A docstring with its sections, `Args:` and what is indented below, as lists."""
    lines, section = [], False
    for line in docstring.splitlines():
        if re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line):
            lines += [f"**{line[:-1]}**", ""]
            section = True
        elif section and line.startswith("    ") and (found := re.match(r" {4}(\S+(?: \([^)]*\))?): (.*)", line)):
            lines.append(f"- `{found[1]}`: {found[2]}")
        else:
            lines.append(f"  {line.strip()}" if section and line else line)
    return "\n".join(lines)


if __name__ == "__main__":
    (DOCS / "commands.md").write_text(commands(), encoding="utf-8")
    (DOCS / "api.md").write_text(api(), encoding="utf-8")
