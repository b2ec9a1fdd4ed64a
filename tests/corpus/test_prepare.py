"""`prepare`: what it makes, and that nothing stops it from making exactly that."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import planlm
from planlm.config import ActionsConfig, PrepareConfig
from planlm.corpus.labels import read_labels, write_labels
from planlm.corpus.prepare import prepare
from planlm.corpus.sources import Documents, Source
from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError, MachineError
from planlm.text.encoder import SentenceEncoder
from planlm.text.sentences import split_sentences

Settings = Callable[..., PrepareConfig]


def contents(folder: Path) -> dict[str, str]:
    """Every file of a corpus with a digest of its bytes."""
    return {
        file.relative_to(folder).as_posix(): hashlib.md5(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_every_column_is_what_it_says(settings: Settings, sixty: str, encoder: Any) -> None:
    config = settings(sixty, shard_documents=25)
    corpus = prepare(config)
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    seen = set()
    for name in ("train", "validation", "test"):
        for row in corpus.split(name):
            seen.add(row["id"])
            spans = split_sentences(row["text"])
            sentences = [row["text"][start:end] for start, end in spans]
            assert row["sentence_spans"] == [list(span) for span in spans]
            assert row["input_ids"] == tokenizer(row["text"]).input_ids
            assert sum(row["sentence_tokens"]) == len(row["input_ids"])
            embeddings = np.array(row["embeddings"], dtype=np.float32)
            np.testing.assert_array_equal(embeddings, encoder.encode(sentences).astype(np.float16))
            distances = np.square(embeddings[:, None] - corpus.codebook.numpy()[None]).sum(axis=-1)
            np.testing.assert_array_equal(row["actions"], distances.argmin(axis=1))
    assert seen == {str(number) for number in range(60)}


def test_manifest_and_layout(settings: Settings, sixty: str) -> None:
    corpus = prepare(settings(sixty))
    manifest = corpus.manifest
    assert manifest.num_actions == 5  # 39 training sentences each
    assert manifest.action_dim == 16 and corpus.codebook.shape == (5, 16) and corpus.codebook.dtype == torch.float32
    assert manifest.has_start_token and manifest.left_out == 0
    loaded = datasets.load_from_disk(str(corpus.path))
    for name, counts in manifest.splits.items():
        rows = loaded[name]
        assert counts["documents"] == len(rows) > 0
        assert counts["sentences"] == sum(map(len, rows["actions"]))
        assert counts["tokens"] == sum(map(len, rows["input_ids"]))
    assert corpus.action_counts.min() > 0
    assert corpus.action_counts.sum() == manifest.splits["train"]["sentences"]
    again = PreparedCorpus.load(corpus.path)
    assert again.manifest == manifest and torch.equal(again.codebook, corpus.codebook)


def test_the_same_command_gives_the_same_bytes(settings: Settings, sixty: str, tmp_path: Path) -> None:
    first, second = (prepare(settings(sixty, out=str(tmp_path / name), shard_documents=25)) for name in "ab")
    assert contents(first.path) == contents(second.path)
    assert not list(first.path.rglob("*partial*"))


def test_shards_do_not_change_what_documents_get(settings: Settings, sixty: str, tmp_path: Path) -> None:
    one = prepare(settings(sixty, out=str(tmp_path / "one")))
    many = prepare(settings(sixty, out=str(tmp_path / "many"), shard_documents=7))
    assert len(list((many.path / "train").glob("*.arrow"))) == 9
    for name in ("train", "validation", "test"):
        assert one.split(name).to_list() == many.split(name).to_list()
    assert torch.equal(one.codebook, many.codebook)


class Killed(BaseException):
    """Stands for a kill: no handler of ordinary errors sees it."""


@pytest.mark.parametrize("moment", range(2, 14))  # from the second shard to the manifest
def test_killed_at_any_write_it_goes_on(
    moment: int, settings: Settings, sixty: str, tmp_path: Path, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(prepare(settings(sixty, out=str(tmp_path / "whole"), shard_documents=25)).path)
    all_calls, encoder.calls = encoder.calls, 0
    config = settings(sixty, shard_documents=25)
    writes = 0

    def fsync(descriptor: int) -> None:
        nonlocal writes
        if writes == moment:
            raise Killed
        writes += 1

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Killed):
        prepare(config)
    monkeypatch.undo()
    monkeypatch.setattr("planlm.corpus.shards.SentenceEncoder", lambda name, precision: encoder)
    out = Path(config.out)
    for folder in (out / "partial", out):
        (folder / ".planlm-0123456789ab.partial").write_bytes(b"half of it")  # left by a kill that no handler sees
    with pytest.raises(InputError, match="has not finished"):
        PreparedCorpus.load(out)
    done = len(list((out / "partial").glob("shard-*.arrow")))
    encoder.calls = 0
    prepare(config)
    assert encoder.calls == all_calls - done, "finished shards were encoded again"
    assert contents(out) == expected


def test_a_full_disk_is_one_line_and_loses_nothing(
    settings: Settings, sixty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(prepare(settings(sixty, out=str(tmp_path / "whole"), shard_documents=25)).path)
    config = settings(sixty, shard_documents=25)
    with monkeypatch.context() as patch:
        replace = Path.replace

        def full(self: Path, target: Path) -> Path:
            if target.name == "shard-00001.arrow":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return replace(self, target)

        patch.setattr(Path, "replace", full)
        with pytest.raises(MachineError, match="no space left") as caught:
            prepare(config)
    assert "\n" not in str(caught.value) and config.out in str(caught.value)
    left = {file.name for file in Path(config.out).rglob("*") if file.is_file()}
    assert left == {"arguments.json", "lock", "shard-00000.arrow"}
    assert contents(prepare(config).path) == expected


def interrupted(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a preparation that stopped before its codebook."""
    with monkeypatch.context() as patch:
        patch.setattr("planlm.corpus.prepare.fit_codebook", lambda *args, **kwargs: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare(config)


def test_an_unfinished_preparation_takes_only_its_own_arguments(
    settings: Settings, sixty: str, jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(settings(sixty), monkeypatch)
    for config, difference in (
        (settings(sixty, min_sentences=3), "min_sentences 2 there, 3 here"),
        (settings(sixty, max_documents=50), "other documents"),
        (settings(jsonl([{"text": "Other. Text."}], "other.jsonl")), "other documents"),
    ):
        with pytest.raises(InputError, match=f"unfinished preparation of another kind .{difference}"):
            prepare(config)
    prepare(settings(sixty))


def test_inputs_spelled_otherwise_are_the_same_preparation(
    settings: Settings, sixty: str, tmp_path: Path, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(settings(sixty), monkeypatch)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(settings(sixty).tokenizer, tmp_path / "moved")
    calls = encoder.calls
    name = Path(sixty).name
    corpus = prepare(settings(f"./{name}", out="corpus", tokenizer="moved"))
    assert encoder.calls == calls
    (tmp_path / name).rename(tmp_path / "kept.jsonl")
    (tmp_path / name).symlink_to("kept.jsonl")
    again = prepare(settings(str(tmp_path / name), out=f"{tmp_path}/../{tmp_path.name}/corpus"))
    assert again.manifest == corpus.manifest
    (tmp_path / name).unlink()
    (tmp_path / name).write_text((tmp_path / "kept.jsonl").read_text().replace("year", "ages", 1))
    with pytest.raises(InputError, match="other documents"):
        prepare(settings(f"./{name}", out="corpus"))


def test_a_source_that_changes_meanwhile_is_named_and_nothing_untrue_is_written(
    settings: Settings, sixty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(prepare(settings(sixty, out=str(tmp_path / "whole"), shard_documents=25)).path)
    before = Path(sixty).read_text()
    config = settings(sixty, shard_documents=25)
    scan = Documents.scan

    def scan_and_change(documents: Documents) -> list[Source]:
        sources = scan(documents)
        Path(sixty).write_text("".join(before.splitlines(keepends=True)[:28]) + '{"text": "New. Rows."}\n')
        return sources

    monkeypatch.setattr(Documents, "scan", scan_and_change)
    with pytest.raises(InputError, match=r"documents.jsonl:29: not what it was at the first reading"):
        prepare(config)
    monkeypatch.setattr(Documents, "scan", scan)
    assert [file.name for file in Path(config.out).rglob("*.arrow")] == ["shard-00000.arrow"]
    assert not (Path(config.out) / "corpus.json").exists()
    Path(sixty).write_text(before)
    assert contents(prepare(config).path) == expected


def test_cheap_things_are_checked_first(settings: Settings, sixty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planlm.corpus.prepare.load_tokenizer", lambda name: pytest.fail("loaded before the checks"))
    for config, message in (
        (settings("none.jsonl"), r"none.jsonl: no such file or folder"),
        (settings(sixty, out=sixty), "cannot be written"),
        (settings(sixty, out=f"{sixty}/below"), "cannot be written"),
        (settings(sixty, out=str(Path(sixty).parent)), "holds other files"),
        (settings(sixty, encoder="./none"), "no such folder"),
        (settings(sixty, tokenizer="/none"), "no such folder"),
        (settings(sixty, test_fraction=0.5, validation_fraction=0.5), "together"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(config)


def test_what_shards_do_not_depend_on_may_change(
    settings: Settings, sixty: str, tmp_path: Path, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="set --actions to at most"):
        prepare(settings(sixty, actions=10_000))
    calls = encoder.calls
    options = {"actions": 8, "validation_fraction": 0.0, "seed": 5}
    resumed = prepare(settings(sixty, **options))
    assert encoder.calls == calls
    assert contents(resumed.path) == contents(prepare(settings(sixty, out=str(tmp_path / "new"), **options)).path)
    assert set(datasets.load_from_disk(str(resumed.path))) == {"train", "test"}
    with pytest.raises(InputError, match="no documents in split 'validation'; it has train, test"):
        resumed.split("validation")


def test_a_codebook_of_other_settings_is_not_kept(
    settings: Settings, sixty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(sixty, actions=8)
    with monkeypatch.context() as patch:
        patch.setattr("planlm.corpus.shards.EncodedShards.write_corpus", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare(config)
    assert (Path(config.out) / "codebook.safetensors").exists()
    resumed = prepare(settings(sixty, actions=6))
    assert contents(resumed.path) == contents(prepare(settings(sixty, out=str(tmp_path / "new"), actions=6)).path)


def test_the_codebook_knows_training_sentences_only(
    settings: Settings, sixty: str, jsonl: Callable[..., str], tmp_path: Path, document_text: Callable[[int], str]
) -> None:
    first = prepare(settings(sixty, actions=8))
    held_out = {row["id"] for name in ("validation", "test") for row in first.split(name)}
    rows = [
        {"id": number, "text": "Something else. Entirely else." if str(number) in held_out else document_text(number)}
        for number in range(60)
    ]
    second = prepare(settings(jsonl(rows, "changed.jsonl"), actions=8, out=str(tmp_path / "second")))
    assert torch.equal(first.codebook, second.codebook)
    rows[int(first.split("train")[0]["id"])]["text"] = "A changed training text. It has two sentences."
    third = prepare(settings(jsonl(rows, "again.jsonl"), actions=8, out=str(tmp_path / "third")))
    assert not torch.equal(first.codebook, third.codebook)


def test_a_finished_corpus_is_returned_or_kept(
    settings: Settings, sixty: str, encoder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare(settings(sixty))
    before, calls = contents(first.path), encoder.calls
    (first.path / "partial").mkdir()  # as a kill after the last file leaves it
    capsys.readouterr()
    again = prepare(settings(sixty))
    assert again.manifest == first.manifest and "is prepared already" in capsys.readouterr().err
    for options, difference in (({"seed": 1}, "seed 0 there, 1 here"), ({"max_documents": 9}, "other documents")):
        with pytest.raises(InputError, match=f"holds another prepared corpus .{difference}"):
            prepare(settings(sixty, **options))
    assert contents(first.path) == before and encoder.calls == calls


def test_documents_get_the_actions_of_another_corpus(
    settings: Settings, sixty: str, jsonl: Callable[..., str], document_text: Callable[[int], str], tmp_path: Path
) -> None:
    first = prepare(settings(sixty))
    labels = [f"label {action}" for action in range(first.manifest.num_actions)]
    write_labels(first.path, labels)
    rows = [{"id": number, "text": document_text(number)} for number in range(100, 140)]
    others = jsonl(rows, "others.jsonl")
    given = {"codebook": str(first.path), "out": str(tmp_path / "second"), "actions": None}
    second = prepare(settings(others, **given))
    assert torch.equal(second.codebook, first.codebook) and read_labels(second.path, len(labels)) == labels
    for row in second.split("train"):
        embeddings = np.array(row["embeddings"], dtype=np.float32)
        distances = np.square(embeddings[:, None] - first.codebook.numpy()[None]).sum(axis=-1)
        assert row["actions"] == distances.argmin(axis=1).tolist()
    assert second.fingerprint == prepare(settings(others, **given)).fingerprint
    with pytest.raises(InputError, match=r"holds another prepared corpus .another codebook"):
        prepare(settings(others, **given | {"codebook": None}))
    with pytest.raises(InputError, match=r"--actions 4: the actions are those of --codebook .*; leave it out"):
        prepare(settings(others, **given | {"actions": 4}))
    with pytest.raises(InputError, match=r"other: the actions of .* are of embeddings by hash; set --encoder to that"):
        prepare(settings(others, **given | {"encoder": "other"}))


def test_other_folders_are_left_alone(settings: Settings, sixty: str, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"):
        prepare(settings(sixty))
    (tmp_path / "corpus" / "partial").mkdir()
    (tmp_path / "corpus" / "thesis.tex").rename(tmp_path / "corpus" / "partial" / "thesis.tex")
    with pytest.raises(InputError, match="holds other files"):
        prepare(settings(sixty))
    assert (tmp_path / "corpus" / "partial" / "thesis.tex").exists()
    with pytest.raises(InputError, match="cannot be written"):
        prepare(settings(sixty, out=sixty))
    assert Path(sixty).read_text().count("\n") == 60


def test_two_calls_at_once_do_not_mix(settings: Settings, sixty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(sixty)
    interrupted(config, monkeypatch)
    with open(Path(config.out) / "partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another `planlm prepare` is at work"):
            prepare(config)


def test_short_documents_are_left_out(
    settings: Settings, jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": number, "text": "One here. " * (1 + number % 3)} for number in range(30)] + [{"text": ""}]
    corpus = prepare(settings(jsonl(rows), actions=1))
    assert corpus.manifest.left_out == 11
    assert sum(split["documents"] for split in corpus.manifest.splits.values()) == 20
    assert "left out 11 of 31 documents with fewer than 2 sentences" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "Only one sentence."}] * 5,
            "none of 5 documents has at least 2 sentences; set --min-",
        ),
        ([{"text": ""}], "none of 1 documents has at least 2 sentences"),
        ([{"text": "Two of. Them here."}] * 2, "2 documents are too few for the splits"),
    ],
)
def test_too_little_text_leaves_nothing_behind(
    rows: list[Any], message: str, settings: Settings, jsonl: Callable[..., str]
) -> None:
    config = settings(jsonl(rows))
    with pytest.raises(InputError, match=message):
        prepare(config)
    assert not Path(config.out).exists()


def test_an_encoder_that_cannot_be_loaded_leaves_nothing_behind(
    settings: Settings, sixty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(sixty)
    with monkeypatch.context() as patch:
        patch.setattr("planlm.corpus.shards.SentenceEncoder", SentenceEncoder)
        with pytest.raises(InputError, match="no such folder"):
            prepare(settings(sixty, encoder="./none"))
    assert not Path(config.out).exists()
    prepare(config)


def test_local_folders_are_named_so_that_other_folders_find_them(
    settings: Settings, sixty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(settings(sixty).tokenizer)
    monkeypatch.chdir(folder.parent)
    assert prepare(settings(sixty, tokenizer=folder.name)).manifest.tokenizer == str(folder)


def test_bad_input_leaves_nothing_behind(settings: Settings, sixty: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.jsonl: no such file"):
        prepare(settings(sixty, str(tmp_path / "none.jsonl")))
    assert not (tmp_path / "corpus").exists()


def test_few_sentences_are_noted_in_one_line(settings: Settings, sixty: str, capfd: pytest.CaptureFixture[str]) -> None:
    prepare(settings(sixty, actions=50))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("few training sentences for 50 actions: 215, 39 an action are advisable") == 1
    assert "WARNING" not in captured.err and len(captured.err.splitlines()) == 2


def test_shares_must_leave_some_for_training(settings: Settings, sixty: str) -> None:
    with pytest.raises(InputError, match=r"--validation-fraction 0.5 and --test-fraction 0.5: together"):
        prepare(settings(sixty, validation_fraction=0.5, test_fraction=0.5))


def test_embeddings_that_are_no_numbers_are_refused(settings: Settings, sixty: str, encoder: Any) -> None:
    encode = encoder.encode
    encoder.encode = lambda sentences: encode(sentences) * 1e6
    with np.errstate(over="ignore"), pytest.raises(InputError, match="not finite in float16"):
        prepare(settings(sixty))


@pytest.mark.parametrize("damage", ["version", "json", "codebook", "arrow"])
def test_damaged_corpora_are_refused(damage: str, settings: Settings, sixty: str) -> None:
    path = prepare(settings(sixty)).path
    manifest = (path / "corpus.json").read_text()
    if damage == "version":
        (path / "corpus.json").write_text(manifest.replace('"format_version": 2', '"format_version": 9'))
    elif damage == "json":
        (path / "corpus.json").write_text(manifest[:100])
    else:
        name = "codebook.safetensors" if damage == "codebook" else "train/data-00000.arrow"
        (path / name).write_bytes((path / name).read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read as a prepared corpus") as caught:
        PreparedCorpus.load(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prepared corpus"):
        PreparedCorpus.load(tmp_path)
    with pytest.raises(InputError, match="no prepared corpus"):
        PreparedCorpus.load(tmp_path / "none")


def test_the_fingerprint_is_of_contents_alone(
    settings: Settings, sixty: str, tmp_path: Path, lm_folder: Callable[[str], str]
) -> None:
    first = prepare(settings(sixty))
    copy = Path(shutil.copytree(first.path, tmp_path / "copy", copy_function=shutil.copy))
    assert re.fullmatch("[0-9a-f]{64}", first.fingerprint)
    assert PreparedCorpus.load(copy).fingerprint == first.fingerprint
    for number, options in enumerate(({"actions": 4}, {"tokenizer": lm_folder("gpt2")}, {"max_documents": 59})):
        other = prepare(settings(sixty, out=str(tmp_path / f"other-{number}"), **options))
        assert other.fingerprint != first.fingerprint


def test_a_long_document_costs_few_times_its_size(lm_folder: Callable[[str], str]) -> None:
    """Sentences, tokens and their arrays of one long text, in a process of its own: at most 40 bytes for each."""
    script = """
import resource, sys
import numpy as np
from planlm.corpus.readers import Document
from planlm.corpus.shards import _encoded
from planlm.pretrained.tokenizer import load_tokenizer

class Encoder:
    name, dim = "zero", 16
    def encode(self, sentences):
        return np.zeros((len(sentences), self.dim), np.float32)

def peak(text):
    _encoded([Document("a", text, "a")], tokenizer, Encoder(), 1, lambda count: None)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

tokenizer = load_tokenizer(sys.argv[1])
sentence = "It was warm there, and the boats of Dr. Smith stayed in the harbour. "
before = peak(sentence * 6000)
size = 1_600_000
print(*((peak(text[:size]) - before) / size for text in (sentence * 30_000, "a. b " * 400_000)))
"""
    run = subprocess.run([sys.executable, "-c", script, lm_folder("gpt2")], capture_output=True, text=True, check=True)
    assert max(map(float, run.stdout.split())) < 40, run.stdout


def test_advice_names_options_that_there_are() -> None:
    options = {field.name.replace("_", "-") for kind in (PrepareConfig, ActionsConfig) for field in fields(kind)}
    found = set()
    for room in ("corpus", "text"):
        for file in Path(planlm.__file__).parent.joinpath(room).glob("*.py"):
            found |= {(file.name, flag) for flag in re.findall(r"--([a-z][a-z-]*[a-z])\b", file.read_text())}
    assert len(found) > 10
    assert {(file, flag) for file, flag in found if flag not in options} == set()
