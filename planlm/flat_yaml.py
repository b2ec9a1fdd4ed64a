"""Settings in a YAML file: `name: value` lines, where a value is plain, a list of plain ones or, if asked, nested."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planlm.errors import InputError

_MOST = 1 << 20
"""Characters; settings are far fewer."""

_DEEPEST, _MOST_VALUES = 8, 20_000
"""Of nested settings. Values are counted where they are used: an anchor can stand for many."""


def read_flat(path: Path) -> dict[str, Any]:
    """Names and values: text, numbers that are written as Python writes them, booleans, None, lists.

    All else stays the text that it is: dates, `010`, `1:30` or `1e-3`, of which YAML 1.1 makes other things.

    Raises:
        InputError: no such file, no YAML, no plain lines, or a name that stands there twice, `-` and `_` being one.
    """
    with _root(path) as (loader, root):
        return {} if root is None else _mapping(path, loader, root, _value)


def read_nested(path: Path) -> dict[str, Any]:
    """As `read_flat`, with mappings and lists in mappings and lists, up to eight deep.

    Raises:
        InputError: as `read_flat`; or nested too deeply, or with too many values.
    """
    count = 0

    def value(where: str, loader: Any, node: Any, depth: int = 1) -> Any:
        nonlocal count
        count += 1
        if depth > _DEEPEST or count > _MOST_VALUES:
            raise InputError(f"{where}: nested too deeply, or too many values")
        if node.id == "sequence" and node.tag.endswith(":seq"):
            return [value(where, loader, item, depth + 1) for item in node.value]
        if node.id == "mapping" and node.tag.endswith(":map"):
            return _mapping(path, loader, node, lambda at, loader, inner: value(at, loader, inner, depth + 1))
        return _value(where, loader, node)

    with _root(path) as (loader, root):
        return {} if root is None else _mapping(path, loader, root, value)


@contextlib.contextmanager
def _root(path: Path) -> Iterator[tuple[Any, Any]]:
    """The file's loader and outermost node; whatever is wrong with it becomes one line."""
    import yaml

    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST + 1)
        if len(text) > _MOST:
            raise InputError(f"{path}: too large for a file of settings")
        loader = yaml.SafeLoader(text)
        yield loader, loader.get_single_node()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a YAML file of settings") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; expected a YAML file of settings") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply; expected lines of the form `setting: value`") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where}: not YAML ({getattr(error, 'problem', None) or 'cannot be read'})") from None


def _mapping(path: Path, loader: Any, root: Any, value: Any) -> dict[str, Any]:
    """Names and what `value` makes of theirs."""
    if root.id != "mapping":
        raise InputError(f"{path}: expected lines of the form `setting: value`")
    found: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, node in root.value:
        line = key.start_mark.line + 1
        if key.id != "scalar" or not key.tag.endswith((":str", ":merge")):
            raise InputError(f"{path}:{line}: expected a setting's name, which is a text")
        name = key.value.replace("-", "_")
        if name in lines:
            raise InputError(f"{path}:{line}: {key.value} is set in line {lines[name]} already; delete one")
        lines[name] = line
        found[key.value] = value(f"{path}:{line}: {key.value}", loader, node)
    return found


def _value(where: str, loader: Any, node: Any) -> Any:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if node.id == "sequence" and kind == "seq" and all(item.id == "scalar" for item in node.value):
        return [_value(where, loader, item) for item in node.value]
    if node.id != "scalar" or kind not in ("str", "int", "float", "bool", "null", "timestamp"):
        raise InputError(f"{where}: expected a plain value or a list of plain values")
    if kind == "timestamp":
        return node.value
    try:
        value = loader.construct_object(node)
        return value if kind in ("bool", "null") or str(value) == node.value else node.value
    except ValueError:  # not what a tag promises, or too many digits
        return node.value
