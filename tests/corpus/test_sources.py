"""Reading documents: every kind of source, and every kind of damage."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from planlm.corpus.inputs import find_inputs
from planlm.corpus.readers import Document, Fields
from planlm.corpus.sources import Documents, Source
from planlm.errors import InputError

FIELDS = Fields(text="text", id="id")
ROWS = [{"id": "a", "text": "First text.", "n": 1}, {"id": 7, "text": "Zweiter Text: ä 漢字."}, {"text": "No id."}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
EXPECTED = [("a", ROWS[0]["text"]), ("7", ROWS[1]["text"]), ("{name}:3", ROWS[2]["text"])]


def read(*inputs: object, fields: Fields = FIELDS) -> list[Document]:
    return list(Documents(find_inputs([str(name) for name in inputs]), fields))


def scan(inputs: list[str], fields: Fields, max_documents: int | None = None) -> list[Source]:
    return Documents(find_inputs(inputs), fields, max_documents).scan()


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
    "dos.jsonl": lambda path: path.write_bytes(LINES.replace(b"\n", b"\r\n")),
    "joined.jsonl": lambda path: path.write_bytes(LINES.replace(b"\n", b"\n\xef\xbb\xbf", 1)),
    "padded.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES) + bytes(700)),
    "d.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES)),
    "d.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES)),
    "D.JSONL.GZ": lambda path: path.write_bytes(gzip.compress(LINES)),
    "d.ndjson": lambda path: path.write_bytes(LINES),
    "lines.json": lambda path: path.write_bytes(LINES),
    "array.json": lambda path: path.write_text(" " + json.dumps(ROWS, indent=1)),
    "array.json.zst": lambda path: path.write_bytes(zstandard.compress(json.dumps(ROWS).encode())),
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


def test_a_wikitext_file_has_a_document_an_article(tmp_path: Path) -> None:
    (tmp_path / "wiki.raw").write_text(
        " \n = Homarus gammarus = \n \n It is a lobster . \n It is blue @-@ black . \n \n = = Description = = \n \n"
        " It has claws . \n = 2 = \n \n = Empty = \n \n \n = = = Deep = = = \n \n = E = mc2 = \n \n It is known . \n"
    )
    found = read(str(tmp_path / "wiki.raw"))
    assert [(one.id, one.text) for one in found] == [
        ("wiki.raw:1", "It is a lobster .\nIt is blue @-@ black .\nIt has claws .\n= 2 ="),
        ("wiki.raw:2", "It is known ."),
    ]


def test_folders_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "b/1.txt", ".hidden/x.txt", "b/.y.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"Text of {name}.")
    assert [document.id for document in read(tmp_path)] == ["a.txt", "b/1.txt", "b/2.txt"]


def test_what_is_left_aside_is_named_and_counted(tmp_path: Path) -> None:
    for name in ("a.txt", ".hidden/x.txt", ".y.txt", "notes.md", "b/data.csv", "empty.jsonl", "b/blank.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name in ("empty.jsonl", "b/blank.txt") else "Text.")
    documents = Documents(find_inputs([str(tmp_path)]), FIELDS)
    (source,) = documents.scan()
    assert (source.documents, source.skipped) == (1, 6)
    (line,) = documents.left_aside()
    assert line.startswith(f"{tmp_path}: left aside ")
    for name in (".hidden/ ", ".y.txt ", "notes.md ", "b/data.csv ", "empty.jsonl (without", "b/blank.txt (without"):
        assert name in line


def test_links_are_followed_or_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.txt").write_text("Text.")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    assert pairs(read(tmp_path / "in")) == [("linked/x.txt", "Text.")]
    for name, target, message in (
        ("gone.txt", tmp_path / "nowhere", r"gone.txt: a link to nothing"),
        ("again.txt", tmp_path / "elsewhere" / "x.txt", r"x.txt: the same as .*again.txt; name it once"),
        ("loop", tmp_path / "in", r"loop: a link to a folder that it is in"),
    ):
        (tmp_path / "in" / name).symlink_to(target)
        with pytest.raises(InputError, match=message):
            read(tmp_path / "in")
        (tmp_path / "in" / name).unlink()


def test_folders_that_cannot_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("Text.")
    scandir = os.scandir

    def denied(path: str) -> object:
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InputError, match=r"closed: cannot be read \(Permission denied\)"):
        read(tmp_path)


@pytest.mark.timeout(20)
def test_pipes_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in (tmp_path / "pipe.jsonl", tmp_path, "/dev/zero", "/dev/stdin"):
        with pytest.raises(InputError, match="no regular file"):
            Documents(find_inputs([str(name)]), FIELDS)


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "none.txt", "none/none.txt", "~nobody/x"])
def test_odd_names_are_one_line(name: str) -> None:
    with pytest.raises(InputError, match=r"no such file|cannot be read") as caught:
        read(name)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def changed(lines: list[bytes], name: str) -> bytes | None:
    edits: dict[str, bytes | None] = {
        "a row": b"".join([lines[0], b'{"text": "other"}\n', *lines[2:]]),
        "an id": b"".join(lines).replace(b'"id": 7', b'"id": 8'),
        "fewer": b"".join(lines[:-1]),
        "more": b"".join([*lines, b'{"text": "new"}\n']),
        "none": b"",
        "gone": None,
    }
    return edits[name]


@pytest.mark.parametrize(
    ("change", "where"),
    [("a row", "d.jsonl:2"), ("an id", "d.jsonl:2"), ("fewer", "d.jsonl:2"), ("more", "d.jsonl:4"), ("none", "d.jsonl"),
     ("gone", "d.jsonl")],
)  # fmt: skip
def test_a_source_that_changes_between_readings_is_refused(change: str, where: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(LINES)
    documents = Documents(find_inputs([str(path)]), FIELDS)
    documents.scan()
    assert len(list(documents)) == 3
    content = changed(LINES.splitlines(keepends=True), change)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(where)) as caught:
        list(documents)
    assert "\n" not in str(caught.value)


def test_ids_are_unique_however_inputs_are_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("a", "b", "x/a"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "part-0.jsonl").write_text('{"text": "One."}\n')
    (tmp_path / "a" / "only.txt").write_text("Two.")
    monkeypatch.chdir(tmp_path)
    assert [document.id for document in read("a")] == ["only.txt", "part-0.jsonl:1"]
    both = ["a/only.txt", "a/part-0.jsonl:1", "b/part-0.jsonl:1"]
    for inputs in (("a", "b"), ("a/", f"{tmp_path}/b"), ("./a", "x/../b")):
        assert [document.id for document in read(*inputs)] == both
    ids = [document.id for document in read("a/part-0.jsonl", "x/a/part-0.jsonl", "b")]
    assert len(set(ids)) == 3 and ids[1] == "x/a/part-0.jsonl:1"
    assert len(Documents(find_inputs(["a", "b", "x/a"]), FIELDS).scan()) == 3
    for twice in (("a", "./a"), ("a", "a/part-0.jsonl"), ("b", f"{tmp_path}/b/")):
        with pytest.raises(InputError, match="name it once"):
            read(*twice)
    (tmp_path / "link.jsonl").symlink_to("b/part-0.jsonl")
    with pytest.raises(InputError, match="name it once"):
        read("link.jsonl", "b")


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
    assert pairs(read(name)) == [(key.format(name="set"), text) for key, text in EXPECTED]
    with pytest.raises(InputError, match=re.escape(f"{name}@nowhere: cannot be read")):
        read(f"{name}@nowhere")
    with pytest.raises(InputError, match="row 1: no field 'body'"):
        read(name, fields=Fields("body", "id"))


def test_data_set_folders_hold_their_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "own.jsonl").write_text('{"text": "own"}\n')
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    for data, mine in (
        ("own.jsonl", True), ("../secret.jsonl", False), (f"{tmp_path}/secret.jsonl", False),
        ("http://127.0.0.1:9/x.jsonl", False),
    ):  # fmt: skip
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {data!r}\n---\n")
        if mine:
            assert pairs(read(f"hf:{folder}")) == [("set:1", "own")]
            continue
        with pytest.raises(InputError, match=r"which is not in the folder|cannot be read"):
            read(f"hf:{folder}")


def test_data_sets_are_named_alike_however_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        parquet(folder / f"{split}.parquet")
    monkeypatch.chdir(tmp_path)
    for name in ("hf:set", "hf:./set/", f"hf:{folder}", "hf:set@train"):
        assert [document.id for document in read(name)] == ["a", "7", "set:3"]
    assert [document.id for document in read("hf:set", "hf:set@test", fields=Fields("text", "none"))] == [
        *(f"set:{row}" for row in (1, 2, 3)), *(f"set@test:{row}" for row in (1, 2, 3))
    ]  # fmt: skip
    with pytest.raises(InputError, match="name it once"):
        read("hf:set", "hf:set@train")


def test_parquet_that_is_not_utf8_is_refused_by_row(tmp_path: Path) -> None:
    good, bad = pa.array(["a", "b"]), pa.array([b"c", b"caf\xe9"]).cast(pa.binary())
    bad = pa.StringArray.from_buffers(2, bad.buffers()[1], bad.buffers()[2])
    pq.write_table(pa.table({"text": pa.chunked_array([good, bad])}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match=r"d.parquet, row 4: not UTF-8"):
        read(tmp_path / "d.parquet")


def test_numbers_of_any_size_are_ids(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(f'{{"text": "a", "id": {10**30}}}\n{{"text": "b\\u0000", "id": -0.5}}\n')
    assert pairs(read(tmp_path / "d.jsonl")) == [(str(10**30), "a"), ("-0.5", "b\0")]


@pytest.mark.parametrize("name", ["hf:", "hf:@train", "hf::en"])
def test_a_data_set_without_a_name_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: names no data set; expected hf:name"):
        read(name)


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
    "cut.jsonl.gz": (GZIPPED[:-100], "{path}:1: cannot be read (it is cut off)"),
    "cut.jsonl.zst": (zstandard.compress(LINES * 100)[:-5], "{path}:1: cannot be read (it is cut off)"),
    "cut.jsonl.xz": (lzma.compress(LINES)[:-30], "{path}:1: cannot be read (it is cut off)"),
    "cut.jsonl.bz2": (bz2.compress(LINES)[:-3], "{path}:1: cannot be read (it is cut off)"),
    "cut.txt.gz": (GZIPPED[:-100], "{path}: cannot be read (it is cut off)"),
    "second.jsonl.gz": (GZIPPED + b"X" + GZIPPED[1:], "{path}:"),
    "second.jsonl.xz": (lzma.compress(LINES) + b"X" + lzma.compress(LINES)[1:], "{path}:1: cannot be read"),
    "second.jsonl.bz2": (bz2.compress(LINES) + b"X" + bz2.compress(LINES)[1:], "{path}:1: cannot be read"),
    "second.jsonl.zst": (zstandard.compress(LINES) + b"X" + zstandard.compress(LINES)[1:], "{path}:"),
    "second-cut.jsonl.xz": (2 * lzma.compress(LINES)[:-9], "{path}:1: cannot be read"),
    "second-cut.jsonl.bz2": (bz2.compress(LINES) + bz2.compress(LINES)[:3], "{path}:1: cannot be read (it is cut off)"),
    "plain.jsonl.gz": (LINES, "{path}:1: cannot be read"),
    "plain.jsonl.zst": (LINES, "{path}:1: cannot be read"),
    "plain.jsonl.xz": (LINES, "{path}:1: cannot be read"),
    "plain.jsonl.bz2": (LINES, "{path}:1: cannot be read"),
    "flipped.jsonl.gz": (GZIPPED[:-6] + b"\0\0\0\0\0\0", "{path}:"),
    "object.json": (b'{\n "text": "a"\n}', "{path}:1: not valid JSON"),
    "broken.json": (b'[{"text": "a"}', "{path}: not valid JSON"),
    "deep.json": (b"[" * 200_000, "{path}: not valid JSON"),
    "texts.json": (b'[{"text": "a"}, "b"]', "{path}, element 2: expected a JSON object with the field 'text'"),
    "nan.jsonl": (b'{"text": "a", "id": NaN}\n', "{path}:1: field 'id' is no id but nan"),
    "huge.jsonl": (b'{"text": "a", "id": 1e999}\n', "{path}:1: field 'id' is no id but inf"),
    "bool.jsonl": (b'{"text": "a", "id": true}\n', "{path}:1: field 'id' is no id but True"),
    "digits.jsonl": (b'{"text": "a", "id": ' + b"9" * 9999 + b"}", "{path}:1: not valid JSON"),
    "utf-16.jsonl": (LINES.decode().encode("utf-16"), "{path}:1: not UTF-8 (byte 0xff)"),
    "plain.parquet": (LINES, "{path}: cannot be read"),
    "page.html": (b"<html>", "{path}: unknown kind of file; expected a folder, or one that ends in .txt"),
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
