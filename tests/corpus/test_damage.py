"""Damage on disk: a changed byte in any file of a corpus, finished or not, is found before it is used."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from planlm.config import ActionsConfig, PrepareConfig
from planlm.corpus.actions import describe_actions, label_actions
from planlm.corpus.labels import LABELS, read_labels
from planlm.corpus.prepare import prepare
from planlm.corpus.store import CODEBOOK, PreparedCorpus, write_manifest
from planlm.corpus.writing import read_arrow, write_arrow
from planlm.errors import InputError

Settings = Callable[..., PrepareConfig]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 8
    path.write_bytes(data)


def read_all(path: Path) -> list[Any]:
    """Everything a corpus holds."""
    corpus = PreparedCorpus.load(path)
    return [
        corpus.manifest,
        corpus.codebook.tolist(),
        *(corpus.split(name).to_list() for name in corpus.manifest.splits),
    ]


@pytest.fixture
def path(settings: Settings, sixty: str) -> Path:
    return prepare(settings(sixty, shard_documents=25, actions=4)).path


def test_a_flipped_byte_is_found_in_every_file(path: Path) -> None:
    generator = random.Random(0)
    files = [file for file in path.rglob("*") if file.is_file() and file.name != LABELS]  # see below
    assert len(files) >= 12
    for file in files:
        sound = file.read_bytes()
        positions = {0, len(sound) - 1, *(generator.randrange(len(sound)) for _ in range(6))}
        for position in positions:
            flip(file, position)
            with pytest.raises(InputError, match="cannot be read as a prepared corpus") as caught:
                read_all(path)
            assert "\n" not in str(caught.value), (file, position)
            file.write_bytes(sound)
        for other in (sound[:-1], sound + b"\0", b""):
            file.write_bytes(other)
            with pytest.raises(InputError, match="cannot be read as a prepared corpus"):
                read_all(path)
            file.write_bytes(sound)
        file.unlink()
        with pytest.raises(InputError):
            read_all(path)
        file.write_bytes(sound)
    read_all(path)


def test_a_flipped_byte_is_found_in_the_labels(path: Path) -> None:
    """They are no part of what is trained on: read where they are shown, and made again where they are gone."""
    labels = read_labels(path, 4)
    sound = (path / LABELS).read_bytes()
    for position in range(len(sound)):
        flip(path / LABELS, position)
        with pytest.raises(InputError, match=LABELS) as caught:
            read_labels(path, 4)
        assert "\n" not in str(caught.value)
        (path / LABELS).write_bytes(sound)
    for other in (sound[:-1], sound + b"\0", b""):
        (path / LABELS).write_bytes(other)
        with pytest.raises(InputError, match=LABELS):
            read_labels(path, 4)
    (path / LABELS).unlink()
    label_actions(PreparedCorpus.load(path))
    assert read_labels(path, 4) == labels


def test_a_file_is_verified_once_while_it_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_all(path)
    with monkeypatch.context() as patch:
        patch.setattr("planlm.corpus.verify.read_arrow", lambda *_: pytest.fail("verified again"))
        read_all(path)
    flip(path / "train" / "data-00001.arrow", 2000)
    with pytest.raises(InputError, match=r"data-00001.arrow is damaged"):
        read_all(path)


def edited(column: str, position: int, value: int) -> Callable[[pa.Table], pa.Table]:
    """A change that Arrow has nothing against."""

    def edit(table: pa.Table) -> pa.Table:
        rows = table[column].to_pylist()
        target = rows[3][position] if column == "sentence_spans" else rows[3]
        target[1 if column == "sentence_spans" else position] = value
        type_ = table.schema.field(column).type
        return table.set_column(table.schema.get_field_index(column), column, pa.chunked_array([pa.array(rows, type_)]))

    return edit


def out_of_bounds(table: pa.Table) -> pa.Table:
    """Offsets beyond the values: Arrow's C++ would read foreign memory, or stop the process."""
    column = table["input_ids"].combine_chunks()
    offsets = column.offsets.to_numpy().copy()
    offsets[2:-1] = 2**30
    bad = pa.ListArray.from_buffers(column.type, len(column), [None, pa.py_buffer(offsets)], children=[column.values])
    return table.set_column(table.schema.get_field_index("input_ids"), table.schema.field("input_ids"), bad)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited("actions", 0, 4), "an action is out of range"),
        (edited("actions", 1, -5), "an action is out of range"),
        (edited("input_ids", 3, 1 << 20), "a token is out of range"),
        (edited("input_ids", 3, -1), "a token is out of range"),
        (edited("sentence_tokens", 0, 3), "do not add up"),
        (edited("sentence_spans", 0, 10_000), "out of its text"),
        (edited("sentence_spans", 1, 0), "out of its text"),
        (lambda table: table.slice(1), "does not hold the documents"),
        (lambda table: table.drop_columns(["text"]), "has other columns"),
        (out_of_bounds, "data-00000.arrow|cannot be read"),
    ],
)
def test_contents_that_do_not_fit_are_refused_though_checksums_do(
    edit: Callable[[pa.Table], pa.Table], message: str, path: Path
) -> None:
    manifest = PreparedCorpus.load(path).manifest
    file = path / "train" / "data-00000.arrow"
    write_arrow(file, edit(pa.table(read_arrow(file).to_pydict(), schema=read_arrow(file).schema)))
    write_manifest(path, manifest)
    corpus = PreparedCorpus.load(path)
    with pytest.raises(InputError, match=message):
        corpus.split("train")


@pytest.mark.parametrize(
    "change",
    [
        {"num_actions": 10**9},
        {"num_actions": "4"},
        {"action_dim": 8},
        {"splits": [1]},
        {"splits": {"train": 3}},
        {"files": {}},
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(change: dict[str, Any], path: Path) -> None:
    manifest = replace(PreparedCorpus.load(path).manifest, **change)
    (path / "corpus.json").write_text(manifest.to_json())
    with pytest.raises(InputError, match="cannot be read as a prepared corpus"):
        describe_actions(ActionsConfig(corpus=str(path)))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", "{}", '{"format_version": 2}', '{"format_version": NaN}'])
def test_a_manifest_of_another_form_is_refused(text: str, path: Path) -> None:
    (path / "corpus.json").write_text(text)
    with pytest.raises(InputError, match="cannot be read as a prepared corpus"):
        PreparedCorpus.load(path)


def test_a_codebook_that_does_not_fit_is_refused(path: Path) -> None:
    manifest = PreparedCorpus.load(path).manifest
    for codebook in (torch.zeros(4, 8), torch.zeros(4, 16).double(), torch.full((4, 16), torch.nan)):
        save_file({"codebook": codebook}, path / CODEBOOK)
        write_manifest(path, manifest)
        with pytest.raises(InputError, match="its codebook is not"):
            PreparedCorpus.load(path)


class Killed(BaseException):
    """Stands for a kill."""


@pytest.fixture
def partial(settings: Settings, sixty: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A preparation that stopped after its last shard."""

    def stop(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("planlm.corpus.prepare.fit_codebook", stop)
        with pytest.raises(Killed):
            prepare(settings(sixty, shard_documents=25, actions=4))
    return Path(settings(sixty).out) / "partial"


def test_damaged_partial_files_are_set_aside_and_made_anew(
    settings: Settings, sixty: str, partial: Path, tmp_path: Path, encoder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(sixty, shard_documents=25, actions=4)
    expected = read_all(prepare(replace(config, out=str(tmp_path / "whole"))).path)
    sound = {file.name: file.read_bytes() for file in partial.iterdir()}
    shard = sound["shard-00001.arrow"]
    generator = random.Random(1)
    damages: list[dict[str, bytes]] = [{"arguments.json": damaged} for damaged in (b"", b"[" * 9000, b"[3]", b"\xff")]
    damages += [{"shard-00001.arrow": damaged} for damaged in (b"", shard[:9], shard[:-1], shard + b"\0")]
    for _ in range(6):
        at = generator.randrange(len(shard))
        damages.append({"shard-00001.arrow": shard[:at] + bytes([shard[at] ^ 64]) + shard[at + 1 :]})
    for damage in damages:
        for name, data in (sound | damage).items():
            partial.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(data)
        encoder.calls = 0
        assert read_all(prepare(config).path) == expected
        is_shard = "shard-00001.arrow" in damage
        assert encoder.calls == is_shard, "only what is damaged is made anew"
        assert ("made anew" in capsys.readouterr().err) == is_shard
        (partial.parent / "corpus.json").unlink()


def test_embeddings_are_those_that_were_encoded(path: Path, encoder: Any) -> None:
    row = PreparedCorpus.load(path).split("train")[0]
    sentences = [row["text"][start:end] for start, end in row["sentence_spans"]]
    np.testing.assert_array_equal(np.array(row["embeddings"], np.float16), encoder.encode(sentences).astype(np.float16))
    assert json.loads((path / "corpus.json").read_text())["files"]["train/data-00000.arrow"][0] > 1000
