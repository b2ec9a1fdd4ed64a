"""Reading documents: text, JSON-lines and parquet files, folders of them, data sets of the Hugging Face hub."""

from __future__ import annotations

import codecs
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from planlm.errors import InputError
from planlm.files import is_utf8
from planlm.progress import Progress
from planlm.text.assets import hub_within_reach

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Document:
    """One document as read.

    Attributes:
        id: from the id field, or file name and row where there is none.
        text: its text, valid Unicode (lone surrogates, which JSON can spell, become U+FFFD).
        where: file and line or row, for messages.
    """

    id: str
    text: str
    where: str


@dataclass(frozen=True)
class Source:
    """What one input held: number of documents, and a fingerprint of their ids and texts in order."""

    input: str
    documents: int
    fingerprint: str


@dataclass(frozen=True)
class Fields:
    """Names of the fields or columns that hold a document's text and id."""

    text: str
    id: str


def read_documents(inputs: Iterable[str], fields: Fields, max_documents: int | None = None) -> Iterator[Document]:
    """Documents of all `inputs`, in order, one at a time.

    A .txt file is one document; of .jsonl, .jsonl.gz, .jsonl.zst and .parquet files every row is one; folders are
    searched for these; `hf:name[:config][@split]` is streamed with `datasets.load_dataset` (split: train).

    Raises:
        InputError: an input is missing, empty, damaged, not UTF-8, not what its suffix says, or lacks the text field;
            the message names file and line.
    """
    return itertools.islice((document for name in inputs for document in _read(name, fields)), max_documents)


def scan(inputs: Iterable[str], fields: Fields, max_documents: int | None = None) -> list[Source]:
    """Read everything once, so that every fault is found before hours of encoding, and fingerprint it.

    Raises:
        InputError: as `read_documents`; also for an id that two documents share.
    """
    inputs = list(inputs)
    sources = []
    hashes = []
    left = max_documents
    with Progress("Reading", unit="documents") as progress:
        for name in inputs:
            digest = blake2b(digest_size=16)
            count = 0
            for document in read_documents([name], fields, left):
                for part in (document.id, document.text):
                    encoded = part.encode()
                    digest.update(len(encoded).to_bytes(8, "little") + encoded)
                hashes.append(id_hash(document.id))
                count += 1
                progress.advance()
            sources.append(Source(name, count, digest.hexdigest()))
            left = None if left is None else left - count
    _refuse_duplicates(np.array(hashes, dtype=np.uint64), read_documents(inputs, fields, max_documents))
    return sources


def id_hash(document_id: str) -> int:
    """A stable hash of 64 bits."""
    return int.from_bytes(blake2b(document_id.encode(), digest_size=8).digest(), "little")


def _refuse_duplicates(hashes: np.ndarray, documents: Iterator[Document]) -> None:
    """Two documents of one id could land on both sides of a split; name them, reading again to find their rows."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(np.diff(hashes[order]) == 0)
    if not len(same):
        return
    first, second = order[same[0]], order[same[0] + 1]
    rows = [document for number, document in enumerate(documents) if number in (first, second)]
    raise InputError(
        f"{rows[1].where}: id {rows[1].id!r} is also that of {rows[0].where}; make ids unique, or name another field "
        "with --id-field (one that is absent gives file name and row)"
    )


def _read(name: str, fields: Fields) -> Iterator[Document]:
    """Documents of one input; refuses one without any."""
    documents = _read_hub(name, fields) if name.startswith("hf:") else _read_path(Path(name), fields)
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise InputError(f"{name}: holds no document")


def _read_path(path: Path, fields: Fields) -> Iterator[Document]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) and not _hidden(file, path))
        for file in files:
            if not is_utf8(str(file)):
                raise InputError(f"{str(file)!a}: the file's name is not valid UTF-8; rename it")
        if not files:
            raise InputError(f"{path}: no file in this folder ends in {', '.join(SUFFIXES)}")
        for file in files:
            yield from _read_file(file, file.relative_to(path).as_posix(), fields)
    elif not path.exists():
        raise InputError(f"{path}: no such file or folder")
    elif _suffix(path) is None:
        raise InputError(f"{path}: unknown kind of file; expected one that ends in {', '.join(SUFFIXES)}, or a folder")
    else:
        yield from _read_file(path, path.name, fields)


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _read_file(path: Path, name: str, fields: Fields) -> Iterator[Document]:
    """Documents of a file; `name` is what ids are made from where there are none."""
    try:
        if _suffix(path) == ".txt":
            yield from _read_text(path, name)
        elif _suffix(path) == ".parquet":
            yield from _read_parquet(path, name, fields)
        else:
            yield from _read_json_lines(path, name, fields)
    except (OSError, pa.ArrowException) as error:
        reason = "it is cut off" if "Truncated" in str(error) else str(error).splitlines()[0].strip()
        raise InputError(f"{path}: cannot be read ({reason})") from error


def _read_text(path: Path, name: str) -> Iterator[Document]:
    data = path.read_bytes()
    if b"\0" in data:
        raise InputError(f"{path}: a binary file, not text (byte 0 at position {data.index(0)})")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 (byte {data[error.start]:#04x}); convert the file") from None
    if text.strip():
        yield Document(name, text, str(path))


def _read_json_lines(path: Path, name: str, fields: Fields) -> Iterator[Document]:
    with pa.input_stream(str(path), compression=_COMPRESSION.get(path.suffix.lower())) as stream:
        for number, line in enumerate(io.BufferedReader(stream, 1 << 20), 1):
            where = f"{path}:{number}"
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.isspace():
                continue
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: not UTF-8 (byte {line[error.start]:#04x}); convert the file") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: expected a JSON object with the field {fields.text!r}, got {line[:40]!r}")
            yield _document(row, fields, f"{name}:{number}", where)


def _read_parquet(path: Path, name: str, fields: Fields) -> Iterator[Document]:
    file = pq.ParquetFile(path)
    have = file.schema_arrow.names
    wanted = [column for column in (fields.text, fields.id) if column in have]
    number = 0
    for batch in file.iter_batches(batch_size=256, columns=wanted if fields.text in have else have[:1]):
        for row in batch.to_pylist():
            number += 1
            shown = row if fields.text in have else dict.fromkeys(have)
            yield _document(shown, fields, f"{name}:{number}", f"{path}, row {number}")


def _read_hub(name: str, fields: Fields) -> Iterator[Document]:
    """Rows of `hf:name[:config][@split]`, streamed, without running any code of the data set's."""
    import datasets

    repository, _, split = name.removeprefix("hf:").partition("@")
    repository, _, config = repository.partition(":")
    if not Path(repository).exists() and not hub_within_reach():
        raise InputError(f"{name}: no such folder here, and the Hugging Face hub cannot be reached")
    try:
        rows = datasets.load_dataset(repository, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield _document(row, fields, f"{repository}:{number}", f"{name}, row {number}")
    except InputError:
        raise
    except Exception as error:  # datasets passes on whatever its readers and the hub's client raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{name}: cannot be read ({reason[:200]})") from error


def _document(row: dict[str, Any], fields: Fields, row_id: str, where: str) -> Document:
    """Check one row's text and id."""
    if fields.text not in row:
        raise InputError(
            f"{where}: no field {fields.text!r}; name the one with the text with --text-field (there are: "
            f"{', '.join(map(repr, row)) or 'none'})"
        )
    text = "" if row[fields.text] is None else row[fields.text]
    if not isinstance(text, str):
        raise InputError(f"{where}: field {fields.text!r} is no text but {text!r:.40}; name another with --text-field")
    document_id = row.get(fields.id)
    if document_id is None:
        document_id = row_id
    elif not isinstance(document_id, str | int | float):
        raise InputError(f"{where}: field {fields.id!r} is no id but {document_id!r:.40}; name another with --id-field")
    return Document(_valid(str(document_id)), _valid(text), where)


def _valid(text: str) -> str:
    """`text` without lone surrogates, which no file can hold."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
