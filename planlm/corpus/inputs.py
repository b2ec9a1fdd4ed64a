"""From the command's inputs to the files that are read, in order, with a name for each that no other has."""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planlm.errors import InputError
from planlm.files import is_utf8

CONTENTS = (".txt", ".raw", ".json", ".jsonl", ".ndjson", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
KINDS = f"{', '.join(CONTENTS)} (all but .parquet also compressed: {', '.join(COMPRESSIONS)})"
HUB = "hf:"


@dataclass
class Part:
    """A file, a data set of `datasets`, or rows in memory, that documents are read from.

    Attributes:
        path: the file as a path from here; for a data set the argument as it was given.
        name: what ids are made from where rows have none.
        above: names of the folders above `name`, outermost first, which set it apart from others of the same name.
        rows: texts, or mappings with a text and perhaps an id, that can be read again; None: they are in the file.
    """

    path: str
    name: str
    above: tuple[str, ...]
    rows: Iterable[Any] | None = None


@dataclass
class Input:
    """One input: what is read of it, and what is not.

    Attributes:
        argument: as it was given.
        parts: files in the order of their names, or the one data set.
        skipped: files and folders that are hidden or of no known kind.
    """

    argument: str
    parts: list[Part]
    skipped: list[str] = field(default_factory=list)


def kind_of(path: str | Path) -> tuple[str, str] | None:
    """A file's content and compression as its name's suffixes say, one of `CONTENTS` and of `COMPRESSIONS` or ""."""
    name = os.path.basename(path).lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    content = next((suffix for suffix in CONTENTS if name.removesuffix(compression).endswith(suffix)), None)
    return None if content is None or (content == ".parquet" and compression) else (content, compression)


def find_inputs(arguments: tuple[str, ...] | list[str]) -> list[Input]:
    """Look for every input, without reading any.

    Folders are searched, through links too. Ids are made from paths below an input, and only where two inputs have
    files of the same name from more of the path above: so they do not depend on how the inputs are spelled.

    Raises:
        InputError: an input is missing, cannot be read, is no regular file, of no known kind, or named twice.
    """
    inputs = [_data_set(name) if name.startswith(HUB) else _path(name) for name in arguments]
    first: dict[str, str] = {}
    for part in (part for found in inputs for part in found.parts):
        real = "/".join((*part.above, part.name)) if part.path.startswith(HUB) else os.path.realpath(part.path)
        if real in first:
            raise InputError(f"{part.path}: the same as {first[real]}; name it once, so that no document is read twice")
        first[real] = part.path
    _tell_apart(inputs)
    return inputs


def in_memory(name: str, rows: Iterable[Any]) -> Input:
    """Texts of a program, or rows with them, as an input called `name`.

    Raises:
        InputError: one text, or a mapping (of columns, of splits) in place of rows.
    """
    if isinstance(rows, str | bytes) or hasattr(rows, "keys") or not hasattr(rows, "__iter__"):
        raise InputError(
            f"{name}: expected a list of texts or of rows, or one split of a Dataset, got {type(rows).__name__}; files "
            "are named with inputs="
        )
    return Input(name, [Part(name, name, (), list(rows) if isinstance(rows, Iterator) else rows)])


def _tell_apart(inputs: list[Input]) -> None:
    """Put as many of the folders above before the names of inputs that share one as make every name unique."""
    plain = [[part.name for part in found.parts] for found in inputs]
    depth = [0] * len(inputs)
    while True:
        owners: dict[str, set[int]] = defaultdict(set)
        for number, found in enumerate(inputs):
            for part, name in zip(found.parts, plain[number], strict=True):
                part.name = "/".join((*part.above[len(part.above) - depth[number] :], name))
                owners[part.name].add(number)
        clashing = {number for sharing in owners.values() if len(sharing) > 1 for number in sharing}
        if not clashing:
            return
        for number in clashing:
            depth[number] = min(depth[number] + 1, max(len(part.above) for part in inputs[number].parts))


def address(argument: str) -> tuple[str, str | None, str]:
    """Repository, configuration and split of `hf:name[:config][@split]`."""
    name, _, split = argument.removeprefix(HUB).partition("@")
    repository, _, config = name.partition(":")
    if not repository:
        raise InputError(f"{argument}: names no data set; expected hf:name[:config][@split]")
    return repository, config or None, split or "train"


def _data_set(argument: str) -> Input:
    """A local folder is known by its own name, however it is spelled."""
    repository, config, split = address(argument)
    above: tuple[str, ...] = (HUB,)
    if os.path.isdir(repository):
        folder = Path(repository).resolve()
        repository, above = folder.name, (HUB, *folder.parent.parts[1:])
    name = repository + (f":{config}" if config else "") + (f"@{split}" if split != "train" else "")
    return Input(argument, [Part(argument, name, above)])


def _path(argument: str) -> Input:
    if not stat.S_ISDIR(_mode(argument)):
        _check_regular(argument)
        if kind_of(argument) is None:
            raise InputError(f"{argument}: unknown kind of file; expected a folder, or one that ends in {KINDS}")
        return Input(argument, [Part(argument, os.path.basename(argument), _above(os.path.dirname(argument)))])
    files, skipped = _walk(argument)
    if not files:
        aside = f"; there are {', '.join(skipped[:5])}" if skipped else ""
        raise InputError(f"{argument}: no file in this folder ends in {KINDS}{aside}")
    above = _above(argument)
    return Input(argument, [Part(os.path.join(argument, *file), "/".join(file), above) for file in files], skipped)


def _above(folder: str) -> tuple[str, ...]:
    return Path(folder).resolve().parts[1:]


def _walk(folder: str) -> tuple[list[tuple[str, ...]], list[str]]:
    """Files to read below `folder`, as the parts of their paths there, and what is left aside."""
    files, skipped = [], []
    for parent, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        inside = Path(parent).relative_to(folder).parts
        for name in folders:
            path = os.path.join(parent, name)
            real = os.path.realpath(path)
            if name.startswith("."):
                skipped.append("/".join((*inside, name, "")))
            elif os.path.islink(path) and os.path.commonpath((real, os.path.realpath(parent))) == real:
                raise InputError(f"{path}: a link to a folder that it is in; remove it")
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or kind_of(name) is None:
                skipped.append("/".join((*inside, name)))
            else:
                _check_regular(os.path.join(parent, name))
                files.append((*inside, name))
    return sorted(files), sorted(os.fsencode(name).decode("utf-8", "backslashreplace") for name in skipped)


def _check_regular(path: str) -> None:
    if not is_utf8(path):
        raise InputError(f"{path!a}: the file's name is not valid UTF-8; rename it")
    if not stat.S_ISREG(_mode(path)):
        raise InputError(
            f"{path}: no regular file (a pipe or device?); write its contents to a file first, since inputs are read "
            "twice"
        )


def _mode(path: str) -> int:
    """File mode of what `path` is or links to."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            raise InputError(f"{path}: a link to nothing ({os.readlink(path)}); mend or remove it") from None
        raise InputError(f"{path or repr(path)}: no such file or folder") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path!r:.200}: cannot be read ({reason})") from None


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read ({error.strerror}); make it readable, or move it away")
