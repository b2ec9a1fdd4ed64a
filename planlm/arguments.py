"""From dataclasses to flags and configuration files, and back: every field of planlm/config/ is both."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from planlm.config import CommandConfig
from planlm.errors import InputError
from planlm.files import is_utf8
from planlm.flat_yaml import read_flat
from planlm.settings import as_kind, kind_of

Config = TypeVar("Config", bound=CommandConfig)

_REPLACED = {"tensorboard": ("tracker", "tensorboard")}
"""Settings that there were, and by which other one and its value each is given now."""


def parse(config_class: type[Config], arguments: list[str], *, prog: str, epilog: str) -> Config:
    """Build a command's configuration: flags win over `--config FILE`, which wins over defaults.

    Args:
        config_class: dataclass of the command; its docstring is the help's first line.
        arguments: the command line behind the command's name.
        prog: "planlm train" and so on.
        epilog: shown at the end of the help.

    Raises:
        InputError: an unknown, missing or malformed argument, or a configuration file that cannot be used.
        SystemExit: after `--help`.
    """
    parser = _build(config_class, prog, epilog)
    for argument in arguments:
        if not is_utf8(argument):
            parser.error(f"argument {argument!a} is not valid UTF-8; rename the file or re-encode the text")
    found, rest = parser.parse_known_intermixed_args(arguments)
    if rest:
        parser.error(_explain_unknown(rest, config_class))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(found).items()}
    file = given.pop("config", None)
    settings = {**(_read_file(Path(str(file)), config_class) if file else {}), **given}
    missing = [_shown(field) for field in _required(config_class) if settings.get(field.name) in (None, ())]
    if missing:
        parser.error(f"missing {', '.join(missing)}")
    return config_class(**settings)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are InputErrors of one line."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise InputError(f"{message} (see {self.prog} --help)")


def _build(config_class: type[Config], prog: str, epilog: str) -> Parser:
    """The parser of a command. Flags that are not given leave no trace, so that a file's values show through."""
    needed = " ".join(_shown(field) for field in _required(config_class))
    parser = Parser(
        prog=prog,
        usage=f"{prog} {needed + ' ' if needed else ''}[options]",
        description=(config_class.__doc__ or "").splitlines()[0],
        epilog=epilog,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34),
    )
    groups = {True: parser.add_argument_group("required"), False: parser.add_argument_group("options")}
    own = list(inspect.get_annotations(config_class))  # they come first, then what several commands share
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for name in sorted(fields, key=lambda name: (name == "json", own.index(name) if name in own else len(own))):
        field = fields[name]
        _add(groups[field in _required(config_class)], field, kind_of(config_class, field.name))
    groups[False].add_argument(
        "--config", metavar="FILE", help="YAML file with any of these settings; flags win over it"
    )
    groups[False].add_argument("--help", "-h", action="help", help="show this help")
    return parser


def _add(group: argparse._ArgumentGroup, field: dataclasses.Field[Any], kind: type) -> None:
    about: dict[str, Any] = {"help": _help(field).replace("%", "%%")}
    if field.metadata["positional"]:
        nargs = "*" if kind is tuple else "?"
        group.add_argument(field.name, nargs=nargs, default=argparse.SUPPRESS, metavar=_metavar(field), **about)
    elif kind is bool:
        group.add_argument(_flag(field), action=argparse.BooleanOptionalAction, **about)
    elif kind is tuple:
        group.add_argument(_flag(field), action="append", metavar=_metavar(field), **about)
    elif field.metadata["choices"]:
        group.add_argument(_flag(field), choices=field.metadata["choices"], **about)
    else:
        metavar = {int: "N", float: "X"}.get(kind, _metavar(field))
        group.add_argument(_flag(field), type=kind, metavar=metavar, **about)


def _help(field: dataclasses.Field[Any]) -> str:
    """The field's help with its default; a default of None is explained by the help itself."""
    default = ("no", "yes")[field.default] if isinstance(field.default, bool) else field.default
    shown = "" if default is dataclasses.MISSING or default is None else f" (default: {default})"
    return f"{field.metadata['help']}{shown}"


def _required(config_class: type[Config]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(config_class) if field.default is dataclasses.MISSING]


def _flag(field: dataclasses.Field[Any]) -> str:
    return "--" + field.name.replace("_", "-")


def _metavar(field: dataclasses.Field[Any]) -> str:
    several = "tuple" in str(field.type)
    return field.name.rstrip("s" if several else "").split("_")[-1].upper()


def _shown(field: dataclasses.Field[Any]) -> str:
    """How usage and errors show a required argument: `INPUT...`, `--out OUT`."""
    if field.metadata["positional"]:
        return _metavar(field) + ("..." if "tuple" in str(field.type) else "")
    return f"{_flag(field)} {_metavar(field)}"


def _explain_unknown(rest: list[str], config_class: type[Config]) -> str:
    """Name the first argument that nothing takes, and the flag it resembles."""
    unknown = next((word for word in rest if word.startswith("-")), rest[0]).split("=")[0]
    if not unknown.startswith("-"):
        return f"unexpected argument {unknown!r}"
    flags = ["--config", "--help", *(_flag(field) for field in dataclasses.fields(config_class))]
    return f"unknown option {unknown}" + _suggest(unknown, flags)


def _suggest(word: str, known: list[str]) -> str:
    now, value = _REPLACED.get(word.removeprefix("--"), ("", ""))
    if now in known:
        return f"; give {now}: {value}"
    if f"--{now}" in known:
        return f"; give --{now} {value}"
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _read_file(path: Path, config_class: type[Config]) -> dict[str, Any]:
    """Settings of a YAML file, checked against the fields' types.

    Raises:
        InputError: no such file, no YAML, no mapping, unknown keys, or values of another type.
    """
    known = {field.name: field for field in dataclasses.fields(config_class)}
    settings = {}
    for key, value in read_flat(path).items():
        name = key.replace("-", "_")
        if name not in known:
            raise InputError(f"{path}: unknown setting {key!r}" + _suggest(name, list(known)))
        if value is None and "None" in str(known[name].type):
            continue
        try:
            settings[name] = as_kind(kind_of(config_class, name), value)
        except ValueError as error:
            raise InputError(f"{path}: {key}: {error}") from None
    return settings
