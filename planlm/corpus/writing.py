"""Writing a corpus: files that appear whole or not at all, in the layout that `store` reads."""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

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


def lists(contents: np.ndarray, lengths: np.ndarray) -> pa.Array:
    """An Arrow column of lists, or of lists of fixed-size lists, without a copy.

    Args:
        contents: what all lists hold, one behind the other, [sum of lengths] or [sum of lengths, width].
        lengths: [lists].
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = pa.array(contents.reshape(-1))
    if contents.ndim == 2:
        values = pa.FixedSizeListArray.from_arrays(values, contents.shape[1])
    return pa.ListArray.from_arrays(offsets, values)


def joined(column: pa.ChunkedArray | pa.ListArray) -> np.ndarray:
    """What the lists of an Arrow column hold, one behind the other: undoes `lists`, a single chunk without a copy."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    values = column.flatten()
    if not pa.types.is_fixed_size_list(values.type):
        return values.to_numpy()
    return values.flatten().to_numpy().reshape(len(values), values.type.list_size)


def sizes(documents: pa.Table | pa.RecordBatch) -> dict[str, int]:
    """How many documents, sentences and tokens some rows of a corpus hold."""
    sentences, tokens = (len(joined(documents[name])) for name in ("actions", "input_ids"))
    return {"documents": len(documents), "sentences": sentences, "tokens": tokens}


def write_arrow(path: Path, table: pa.Table) -> None:
    """An Arrow stream, as `datasets` keeps them."""
    with replacing(path) as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_sealed(path: Path, table: pa.Table, identity: str) -> None:
    """An Arrow stream that says what it was made from and, behind its end, where no reader looks, its own checksum."""
    with replacing(path) as file:
        with pa.ipc.new_stream(file, table.schema.with_metadata({_IDENTITY: identity})) as writer:
            writer.write_table(table)
        file.seek(0)
        file.write(hashlib.file_digest(file, xxhash.xxh3_128).digest())  # type: ignore[arg-type]


def seal(path: Path) -> str | None:
    """The identity with which a sealed file was written, or None where its bytes are not what was written."""
    if path.stat().st_size == 0:  # there is nothing to map
        return None
    with pa.memory_map(str(path)) as source:
        data = memoryview(source.read_buffer())
        if xxhash.xxh3_128_digest(data[:-16]) != bytes(data[-16:]):
            return None
        return (pa.ipc.open_stream(data[:-16]).schema.metadata or {}).get(_IDENTITY, b"").decode()


def read_arrow(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A memory-mapped Arrow stream; `columns` costs only what those hold."""
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_stream(source).read_all()
    return table if columns is None else table.select(columns)
