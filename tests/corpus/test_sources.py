"""Reading documents: every kind of source, and every kind of damage."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from planlm.corpus.sources import Document, Fields, read_documents, scan
from planlm.errors import InputError

FIELDS = Fields(text="text", id="id")
ROWS = [{"id": "a", "text": "First text.", "n": 1}, {"id": 7, "text": "Zweiter Text: ä 漢字."}, {"text": "No id."}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
EXPECTED = [("a", ROWS[0]["text"]), ("7", ROWS[1]["text"]), ("{name}:3", ROWS[2]["text"])]


def read(*inputs: object, fields: Fields = FIELDS) -> list[Document]:
    return list(read_documents([str(name) for name in inputs], fields))


def pairs(documents: list[Document]) -> list[tuple[str, str]]:
    return [(document.id, document.text) for document in documents]


def parquet(path: Path) -> None:
    pq.write_table(pa.table({"id": ["a", "7", None], "text": [row["text"] for row in ROWS], "n": [1, 2, 3]}), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "d.jsonl": lambda path: path.write_bytes(LINES),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES),
    "d.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "two-members.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES[:20]) + gzip.compress(LINES[20:])),
    "d.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(LINES)),
    "d.parquet": parquet,
    "no-last-newline.jsonl": lambda path: path.write_bytes(LINES.rstrip()),
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert pairs(read(tmp_path / name)) == [(key.format(name=name), text) for key, text in EXPECTED]


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b"\n  \n" + LINES)
    assert [document.where[-2:] for document in read(tmp_path / "d.jsonl")] == [":3", ":4", ":5"]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne.\n\nTwo.\n")
    assert pairs(read(tmp_path / "a.txt")) == [("a.txt", "One.\n\nTwo.\n")]


def test_folders_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "b/1.txt", ".hidden/x.txt", "b/.y.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"Text of {name}.")
    assert [document.id for document in read(tmp_path)] == ["a.txt", "b/1.txt", "b/2.txt"]


def test_other_field_names(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"body": "Text.", "key": 3.5}\n')
    assert pairs(read(tmp_path / "d.jsonl", fields=Fields("body", "key"))) == [("3.5", "Text.")]


def test_missing_text_is_empty_and_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": null}\n{"text": "a \\ud800 b \\ud83d\\ude42"}\n')
    assert [text for _, text in pairs(read(tmp_path / "d.jsonl"))] == ["", "a \ufffd b 🙂"]


def test_data_set_folder_is_streamed(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    parquet(folder / "train-00000-of-00001.parquet")
    name = f"hf:{folder}"
    assert pairs(read(name)) == [(key.format(name=folder), text) for key, text in EXPECTED]
    with pytest.raises(InputError, match=re.escape(f"{name}@nowhere: cannot be read")):
        read(f"{name}@nowhere")
    with pytest.raises(InputError, match="row 1: no field 'body'"):
        read(name, fields=Fields("body", "id"))


def test_hub_out_of_reach_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(InputError, match=r"hf:some/set:en@train: .*hub cannot be reached"):
        read("hf:some/set:en@train")


GZIPPED = gzip.compress(os.urandom(3000).hex().join(["", "", ""]).encode() + LINES)
FAULTS = {
    "empty.jsonl": (b"", "{path}: holds no document"),
    "blank.jsonl": (b"\n\n", "{path}: holds no document"),
    "empty.txt": (b"", "{path}: holds no document"),
    "blank.txt": (b" \n", "{path}: holds no document"),
    "empty.jsonl.gz": (b"", "{path}: holds no document"),
    "empty.parquet": (b"", "{path}: cannot be read"),
    "binary.txt": (b"ELF\0\1\2", "{path}: a binary file, not text (byte 0 at position 3)"),
    "latin.txt": ("one\ntwo\ncaf\xe9".encode("latin-1"), "{path}:3: not UTF-8 (byte 0xe9)"),
    "latin.jsonl": (LINES + b'{"text": "caf\xe9"}\n', "{path}:4: not UTF-8 (byte 0xe9)"),
    "binary.jsonl": (bytes(range(256)), "{path}:1: not"),
    "broken.jsonl": (LINES + b'{"text": "cut', "{path}:4: not valid JSON"),
    "deep.jsonl": (b"[" * 200_000, "{path}:1: not valid JSON"),
    "list.jsonl": (b'["a text"]\n', "{path}:1: expected a JSON object with the field 'text'"),
    "field.jsonl": (b'{"title": "t", "body": "b"}\n', "{path}:1: no field 'text'; name the one"),
    "number.jsonl": (b'{"text": 3}\n', "{path}:1: field 'text' is no text but 3"),
    "id.jsonl": (b'{"text": "a", "id": {"a": 1}}\n', "{path}:1: field 'id' is no id"),
    "cut.jsonl.gz": (GZIPPED[:-100], "{path}: cannot be read (it is cut off)"),
    "cut.jsonl.zst": (zstandard.compress(LINES * 100)[:-5], "{path}: cannot be read (it is cut off)"),
    "plain.jsonl.gz": (LINES, "{path}: cannot be read"),
    "plain.jsonl.zst": (LINES, "{path}: cannot be read"),
    "plain.parquet": (LINES, "{path}: cannot be read"),
    "page.html": (b"<html>", "{path}: unknown kind of file; expected one that ends in .txt"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_one_line_that_names_the_place(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    content, message = FAULTS[name]
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).startswith(message.format(path=path)) and "\n" not in str(caught.value)


def test_parquet_without_the_column(tmp_path: Path) -> None:
    parquet(tmp_path / "d.parquet")
    with pytest.raises(InputError, match=r"d.parquet, row 1: no field 'body'.*'id', 'text', 'n'"):
        read(tmp_path / "d.parquet", fields=Fields("body", "id"))


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "none.txt")
    with pytest.raises(InputError, match="no file in this folder"):
        read(tmp_path)


def test_fingerprints_are_of_contents(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.jsonl.gz"):
        WRITERS["d" + name[1:]](tmp_path / name)
    (tmp_path / "x.jsonl").write_bytes(b"".join(LINES.splitlines(keepends=True)[:2]))
    short, whole = (scan([str(tmp_path / name)], FIELDS)[0] for name in ("x.jsonl", "x.jsonl.gz"))
    limited = scan([str(tmp_path / "x.jsonl.gz")], FIELDS, max_documents=2)[0]
    assert (short.documents, whole.documents, limited.documents) == (2, 3, 2)
    assert short.fingerprint == limited.fingerprint != whole.fingerprint


def test_shared_ids_are_refused_with_both_rows(jsonl: Callable[..., str]) -> None:
    first = jsonl([{"id": 1, "text": "a"}, {"id": 2, "text": "b"}], "first.jsonl")
    second = jsonl([{"id": 3, "text": "c"}, {"id": 2, "text": "d"}], "second.jsonl")
    with pytest.raises(InputError, match=r"second.jsonl:2: id '2' is also that of .*first.jsonl:2; .*--id-field"):
        scan([first, second], FIELDS)
    assert len(scan([first, second], Fields("text", "none"))) == 2
