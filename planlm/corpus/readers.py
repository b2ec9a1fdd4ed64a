"""Reading documents from one file or data set: text, JSON, JSON lines, parquet, whatever `datasets` reads."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import itertools
import json
import lzma
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from planlm.corpus.inputs import HUB, Part, address, kind_of
from planlm.errors import InputError
from planlm.pretrained.names import hub_within_reach

BLOCK = 1 << 20


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
class Fields:
    """Names of the fields or columns that hold a document's text and id."""

    text: str
    id: str


def read_part(part: Part, fields: Fields) -> Iterator[Document]:
    """Documents of a file, a data set or rows in memory, one at a time.

    A .txt file is one document; of a .raw file, which is WikiText's, every article is one; of .jsonl, .ndjson and
    .parquet files every row, of a .json file every element of its one array, or every row;
    `hf:name[:config][@split]` is streamed with `datasets.load_dataset` (split: train).

    Raises:
        InputError: it is damaged, not UTF-8, not what its suffix says, or lacks the text field; the message names file
            and line.
    """
    if part.rows is not None:
        yield from _read_rows(part.rows, part, fields)
        return
    if part.path.startswith(HUB):
        yield from _read_hub(part, fields)
        return
    content, compression = kind_of(part.path) or ("", "")
    if content == ".parquet":
        yield from _read_parquet(part, fields)
        return
    with _decoding(part.path), _opened(part.path, compression) as stream:
        if content == ".txt":
            yield from _read_text(stream, part)
        elif content == ".raw":
            yield from _read_wikitext(stream, part)
        elif content == ".json" and _begins_array(stream):
            yield from _read_array(stream, part, fields)
        else:
            yield from _read_lines(stream, part, fields)


def _opened(path: str, compression: str) -> IO[bytes]:
    """Contents of a file, decompressed, with `peek`."""
    if compression == ".zst":  # Python has no module for it before 3.14
        return io.BufferedReader(pa.input_stream(path, compression="zstd"), BLOCK)
    if compression == "":
        return open(path, "rb", buffering=BLOCK)
    if compression == ".gz":
        return io.BufferedReader(gzip.open(path), BLOCK)  # type: ignore[arg-type]
    new = bz2.BZ2Decompressor if compression == ".bz2" else lzma.LZMADecompressor
    return io.BufferedReader(_Streams(open(path, "rb"), new), BLOCK)


class _Streams(io.RawIOBase):
    """Streams of bzip2 or xz one after another, as those tools write them, with zero bytes between or behind them.

    Python's own readers take a stream with a damaged beginning for the end of the file, and lose all from there.
    """

    def __init__(self, file: IO[bytes], new: Callable[[], Any]) -> None:
        self._file, self._new, self._stream = file, new, new()

    def readable(self) -> bool:
        """Yes."""
        return True

    def close(self) -> None:
        """Close the file too."""
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; the number of bytes, fewer at the end only. Raises EOFError where the file is cut off."""
        filled = 0
        while filled < len(buffer):
            block = b""
            if self._stream.eof:
                block = self._stream.unused_data.lstrip(b"\0")
                while not block and (more := self._file.read(BLOCK)):
                    block = more.lstrip(b"\0")
                if not block:
                    break
                self._stream = self._new()
            elif self._stream.needs_input and not (block := self._file.read(BLOCK)):
                raise EOFError("the file ended before the end of its stream")
            data = self._stream.decompress(block, len(buffer) - filled)
            buffer[filled : filled + len(data)] = data
            filled += len(data)
        return filled


@contextlib.contextmanager
def _decoding(where: str) -> Iterator[None]:
    """Say in one line that a file cannot be read or decompressed."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        cut_off = any(words in str(error) for words in ("Truncated", "ended before the end"))
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0].strip()
        raise InputError(f"{where}: cannot be read ({'it is cut off' if cut_off else reason})") from error


def _decoded(data: bytes, where: str, line: int | None = None) -> str:
    """`data` as text; `where` and the line that it is, or else the line of the fault, name it in the message."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = line or data.count(10, 0, error.start) + 1
        raise InputError(f"{where}:{line}: not UTF-8 (byte {data[error.start]:#04x}); convert the file") from None


def _read_text(stream: IO[bytes], part: Part) -> Iterator[Document]:
    data = stream.read()
    if b"\0" in data:
        raise InputError(f"{part.path}: a binary file, not text (byte 0 at position {data.index(0)})")
    text = _decoded(data, part.path)
    if text.strip():
        yield Document(part.name, text, part.path)


def _read_wikitext(stream: IO[bytes], part: Part) -> Iterator[Document]:
    """Articles, which begin with a heading ` = Title = `; headings, ` = = Section = = ` too, are left out."""
    paragraphs: list[str] = []
    number, begins = 1, f"{part.path}:1"
    after_empty = True
    for line, data in enumerate(stream, 1):
        text = _decoded(data, part.path, line).strip()
        is_heading = after_empty and text.startswith("= ") and text.endswith(" =")
        if is_heading and not text.startswith("= = ") and paragraphs:
            yield Document(f"{part.name}:{number}", "\n".join(paragraphs), begins)
            paragraphs, number, begins = [], number + 1, f"{part.path}:{line}"
        if text and not is_heading:
            paragraphs.append(text)
        after_empty = not text
    if paragraphs:
        yield Document(f"{part.name}:{number}", "\n".join(paragraphs), begins)


def _begins_array(stream: IO[bytes]) -> bool:
    """Whether a JSON file holds one array; looks no further than the first block."""
    return stream.peek(BLOCK).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["  # type: ignore[attr-defined]


def _read_array(stream: IO[bytes], part: Part, fields: Fields) -> Iterator[Document]:
    rows = _parsed(_decoded(stream.read(), part.path), part.path)
    for number, row in enumerate(rows, 1):
        yield _document(row, fields, f"{part.name}:{number}", f"{part.path}, element {number}")


def _read_lines(stream: IO[bytes], part: Part, fields: Fields) -> Iterator[Document]:
    for number in itertools.count(1):
        where = f"{part.path}:{number}"
        with _decoding(where):
            line = stream.readline()
        if not line:
            return
        text = _decoded(line, part.path, number)
        if text.strip(" \t\r\n"):
            yield _document(_parsed(text, where), fields, f"{part.name}:{number}", where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None


def _read_parquet(part: Part, fields: Fields) -> Iterator[Document]:
    number = 0
    with _decoding(part.path), pq.ParquetFile(part.path) as file:
        have = file.schema_arrow.names
        wanted = [column for column in (fields.text, fields.id) if column in have]
        columns = wanted if fields.text in have else have[:1]
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for at in range(len(batch)):
                number += 1
                where = f"{part.path}, row {number}"
                try:
                    row = {name: batch.column(name)[at].as_py() for name in wanted}
                except UnicodeDecodeError:
                    raise InputError(f"{where}: not UTF-8; convert the file") from None
                except (ValueError, KeyError, OverflowError) as error:  # dates beyond Python's, a name of two columns
                    raise InputError(f"{where}: cannot be read ({error})") from None
                shown = row if fields.text in have else dict.fromkeys(have)
                yield _document(shown, fields, f"{part.name}:{number}", where)


def _read_rows(rows: Iterable[Any], part: Part, fields: Fields) -> Iterator[Document]:
    """Texts, or mappings with text and id. Of a Dataset the two columns are read, whatever its format."""
    import datasets

    if isinstance(rows, datasets.Dataset) and fields.text in rows.column_names:
        rows = rows.with_format(None, columns=[name for name in (fields.text, fields.id) if name in rows.column_names])
    for number, row in enumerate(rows, 1):
        found = dict(row) if isinstance(row, Mapping) else {fields.text: row}
        yield _document(found, fields, f"{part.name}:{number}", f"{part.path}, row {number}")


def _read_hub(part: Part, fields: Fields) -> Iterator[Document]:
    """Rows of `hf:name[:config][@split]`, streamed, without running any code of the data set's."""
    import datasets

    repository, config, split = address(part.path)
    if not Path(repository).exists() and not hub_within_reach():
        raise InputError(f"{part.path}: no such folder here, and the Hugging Face hub cannot be reached")
    try:
        if os.path.isdir(repository):
            _refuse_foreign_files(datasets.load_dataset_builder(repository, config), repository, part.path)
        rows = datasets.load_dataset(repository, config, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield _document(row, fields, f"{part.name}:{number}", f"{part.path}, row {number}")
    except InputError:
        raise
    except Exception as error:  # datasets passes on whatever its readers and the hub's client raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{part.path}: cannot be read ({reason[:200]})") from error


def _refuse_foreign_files(builder: Any, repository: str, where: str) -> None:
    """A folder's README can name any file or address as its data; only what is in the folder is the data set's."""
    folder = Path(repository).resolve()
    root = folder.parent.parent if folder.parent.name == "snapshots" else folder  # the hub's cache links to its blobs
    for file in (file for files in (builder.config.data_files or {}).values() for file in files):
        path = file.rpartition("::")[2]  # a member of an archive is named "zip://member::archive"
        if "://" in path or not Path(path).resolve().is_relative_to(root):
            raise InputError(f"{where}: its README names {file} as data, which is not in the folder; mend the README")


def _document(row: Any, fields: Fields, row_id: str, where: str) -> Document:
    """Check one row's text and id."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object with the field {fields.text!r}, got {row!r:.40}")
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
    is_plain = isinstance(document_id, str | int | float) and not isinstance(document_id, bool)
    if not is_plain or (isinstance(document_id, float) and not math.isfinite(document_id)):
        raise InputError(f"{where}: field {fields.id!r} is no id but {document_id!r:.40}; name another with --id-field")
    return Document(_valid(str(document_id)), _valid(text), where)


def _valid(text: str) -> str:
    """`text` without lone surrogates, which no file can hold."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
