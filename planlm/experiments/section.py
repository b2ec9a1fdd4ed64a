"""Parts of an experiment's YAML file: mappings whose names are taken one by one, and options as commands have them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from planlm.config import CommandConfig
from planlm.errors import InputError
from planlm.settings import as_kind, kind_of

OURS = {
    "corpus", "out", "json", "resume", "seed", "lm", "planner", "run", "split", "plans", "versus", "file", "jobs",
    "dry_run",
}  # fmt: skip
"""Options that the experiment sets itself."""


class Section:
    """A mapping of the file whose names are taken one by one; what nobody takes is unknown.

    Args:
        where: the file and the names that lead here.
        content: the mapping.
    """

    def __init__(self, where: str, content: Any) -> None:
        if not isinstance(content, dict):
            raise InputError(f"{where}: expected names with values below it, got {shown(content)}")
        self.where, self._known = where, set[str]()
        self._content = {name.replace("-", "_"): (name, value) for name, value in content.items()}

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """The value of a name, of this kind (str, bool, list, dict, float)."""
        self._known.add(name)
        given, value = self._content.pop(name, (name, None))
        if value is None:
            return default
        if kind is list:
            return value if isinstance(value, list) else [value]
        if kind is not dict:
            try:
                return as_kind(kind, value)
            except ValueError as error:
                raise InputError(f"{self.where}: {given}: {error}") from None
        return Section(f"{self.where}: {given}", value)

    def names(self, name: str) -> Iterator[tuple[str, Any]]:
        """Names of a mapping with their values, as they are written; none where it is not there."""
        self._known.add(name)
        given, value = self._content.pop(name, (name, {}))
        return iter(Section(f"{self.where}: {given}", value)._content.values())

    def options(self, *configs: type[CommandConfig]) -> dict[str, Any]:
        """All that is left, as options of one of these commands."""
        known = {name: config for config in reversed(configs) for name in names_of(config) - OURS}
        self._known |= known.keys()
        found = {}
        for name in [name for name in self._content if name in known]:
            given, value = self._content.pop(name)
            found[name] = as_option(f"{self.where}: {given}", known[name], name, value)
        self.done()
        return found

    def done(self) -> None:
        """Refuse what is left."""
        for name, (given, _) in self._content.items():
            if name in OURS:
                raise InputError(f"{self.where}: {given}: is set by the experiment itself; delete it")
            close = difflib.get_close_matches(name, sorted(self._known), n=1)
            raise InputError(f"{self.where}: unknown {given!r}" + (f"; did you mean {close[0]}?" if close else ""))


def as_option(where: str, config: type[CommandConfig], name: str, value: Any) -> Any:
    """A value as the type of a command's option.

    Raises:
        InputError: says where it stands.
    """
    hint = next(field.type for field in fields(config) if field.name == name)
    if value is None and "None" in str(hint):
        return None
    try:
        value = as_kind(kind_of(config, name), value)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    return list(value) if isinstance(value, tuple) else value


def names_of(config: type[CommandConfig]) -> set[str]:
    """Options of a command."""
    return {field.name for field in fields(config)}


def shown(value: Any) -> str:
    """A value in an error's one line."""
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else text[:77] + "..."
