"""Writing a corpus: files that appear whole or not at all, in the layout that `store` reads."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Features

from planlm.errors import InputError, MachineError
from planlm.files import replacing

_IDENTITY = b"planlm.identity"


@contextlib.contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Say in one line that the disk is full, or that `folder` cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise MachineError(
                f"{folder}: no space left on the disk; what is finished is kept: make room and run the same command "
                "again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise InputError(f"{folder}: cannot be written ({error.strerror}); give another --out") from error
        raise MachineError(f"{folder}: {error}; run the same command again") from error


def write_json(path: Path, content: Any) -> None:
    """One JSON value, the same bytes for the same value."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def lists(joined: np.ndarray, lengths: np.ndarray) -> pa.Array:
    """An Arrow column of lists, or of lists of fixed-size lists, without a copy.

    Args:
        joined: what all lists hold, one behind the other, [sum of lengths] or [sum of lengths, width].
        lengths: [lists].
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = pa.array(joined.reshape(-1))
    if joined.ndim == 2:
        values = pa.FixedSizeListArray.from_arrays(values, joined.shape[1])
    return pa.ListArray.from_arrays(offsets, values)


def write_arrow(path: Path, table: pa.Table) -> None:
    """An Arrow stream, as `datasets` keeps them."""
    with replacing(path) as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_sealed(path: Path, table: pa.Table, identity: str) -> None:
    """An Arrow stream that says what it was made from and, behind its end, where no reader looks, its own checksum."""
    with replacing(path) as file:
        digesting = _Digesting(file)
        with pa.ipc.new_stream(digesting, table.schema.with_metadata({_IDENTITY: identity})) as writer:
            writer.write_table(table)
        file.write(digesting.digest.digest())


def seal(path: Path) -> str | None:
    """The identity with which a sealed file was written, or None where its bytes are not what was written."""
    digest = xxhash.xxh3_128()
    left = path.stat().st_size - digest.digest_size
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        if file.read() != digest.digest():
            return None
    with pa.memory_map(str(path)) as source:
        return (pa.ipc.open_stream(source).schema.metadata or {}).get(_IDENTITY, b"").decode()


class _Digesting:
    """A file to write for Arrow, with a checksum of what went through."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = xxhash.xxh3_128()

    def write(self, block: Any) -> int:
        self.digest.update(block)
        return self._file.write(block)

    def flush(self) -> None:
        self._file.flush()


def read_arrow(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A memory-mapped Arrow stream; `columns` costs only what those hold."""
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_stream(source).read_all()
    return table if columns is None else table.select(columns)


def checksum(path: Path) -> str:
    """XXH3 of a file's contents, 128 bits in hexadecimal: finds damage, and at 10 GB/s waits for the disk only."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_split_files(folder: Path, name: str, files: list[str], features: Features) -> None:
    """The two JSON files with which `datasets.load_from_disk` opens the Arrow `files` in `folder`."""
    write_json(folder / "dataset_info.json", {"features": features.to_dict()})
    contents = "".join(checksum(folder / file) for file in files)
    state: dict[str, Any] = {
        "_data_files": [{"filename": file} for file in files],
        # A cache key of datasets'; derived from the contents, since a random one would change the corpus' bytes.
        "_fingerprint": xxhash.xxh3_64_hexdigest(contents.encode()),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": name,
    }
    write_json(folder / "state.json", state)
