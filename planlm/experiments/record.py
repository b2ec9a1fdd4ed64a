"""The record of a finished task: a JSON object with a checksum of it, so that a damaged one is told from a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from planlm.errors import InputError
from planlm.files import read_json, write_json

SHAPE = {"kind": str, "began": str, "seconds": int | float, "result": dict}
"""Of every record; what else is there is its task's."""


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write a record, whole or not at all."""
    write_json(path, {**content, "checksum": _checksum(content)})


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` was given.

    Raises:
        InputError: it is something else; a record without checksum, of an older version, need only look like one.
    """
    content = read_json(path)
    checksum = content.pop("checksum", None)
    is_like_one = all(isinstance(content.get(name), kind) for name, kind in SHAPE.items())
    if not is_like_one or checksum not in (None, _checksum(content)):
        raise InputError(f"{path}: damaged; delete it, and the task is done again")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode())
