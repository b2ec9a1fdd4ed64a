"""The commands as functions of the package, and texts in memory in place of files."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

import planlm
from planlm import config
from planlm.corpus import prepare as preparation
from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError
from tests.corpus.conftest import document

ROWS = [{"id": f"d{number}", "text": document(number)} for number in range(30)]


@pytest.fixture
def prepare(
    tmp_path: Path, lm_folder: Callable[[str], str], encoder: object, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., PreparedCorpus]:
    """`planlm.prepare` with the tiny tokenizer and the hashing encoder, into the folder `out` of this test."""
    monkeypatch.setattr("planlm.corpus.shards.SentenceEncoder", lambda name, precision: encoder)
    few = {"encoder": "hash", "tokenizer": lm_folder("gpt2"), "actions": 8, "shard_documents": 10}

    def call(*texts: Any, out: str = "corpus", **settings: Any) -> PreparedCorpus:
        return planlm.prepare(*texts, out=str(tmp_path / out), **few | settings)

    return call


def contents(corpus: PreparedCorpus) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Every file but the manifest, and the manifest without the sources' name."""
    folder = Path(corpus.path)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del files["corpus.json"]
    manifest = dataclasses.asdict(corpus.manifest)
    for source in manifest["sources"]:
        del source["input"]
    return files, manifest


@pytest.mark.parametrize(
    "made",
    [
        lambda rows: rows,
        lambda rows: iter(rows),
        lambda rows: datasets.Dataset.from_list([{"n": 1, **row} for row in rows]),
        lambda rows: datasets.Dataset.from_list(rows).with_format("torch"),
        lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    ],
    ids=["list", "iterator", "Dataset", "Dataset of tensors", "IterableDataset"],
)
def test_rows_in_memory_are_those_of_a_file(
    prepare: Callable[..., PreparedCorpus], tmp_path: Path, made: Callable[[list[Any]], Any]
) -> None:
    """Ids that are numbers too, which some formats make tensors of."""
    rows = [{**row, "id": number} for number, row in enumerate(ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_file = prepare(inputs=str(tmp_path / "rows.jsonl"), out="of-a-file")
    assert contents(prepare(made(rows))) == contents(from_file)


def test_texts_without_ids_are_known_by_their_place(prepare: Callable[..., PreparedCorpus]) -> None:
    texts = [row["text"] for row in ROWS]
    corpus = prepare(texts)
    ids = {row_id: text for split in ("train", "validation") for row_id, text in _pairs(corpus, split)}
    assert ids.items() <= {f"texts:{number}": text for number, text in enumerate(texts, 1)}.items()
    mixed = prepare([{"text": text} if number % 2 else text for number, text in enumerate(texts)], out="mixed")
    assert contents(mixed) == contents(corpus)


def _pairs(corpus: PreparedCorpus, split: str) -> Iterator[tuple[str, str]]:
    rows = corpus.split(split)
    return zip(rows["id"], rows["text"], strict=True)


def test_an_interrupted_preparation_goes_on_from_memory(
    prepare: Callable[..., PreparedCorpus], monkeypatch: pytest.MonkeyPatch, encoder: Any
) -> None:
    whole = prepare(ROWS, out="whole")
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "fit_codebook", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(ROWS)
    encoder.calls = 0
    assert contents(prepare(ROWS)) == contents(whole)
    assert encoder.calls == 0, "finished shards are not made again"
    with pytest.raises(InputError, match="other documents"):
        prepare(ROWS[:-1])


def test_texts_that_change_between_the_readings_are_refused(prepare: Callable[..., PreparedCorpus]) -> None:
    class Changing:
        times = 0

        def __iter__(self) -> Iterator[str]:
            self.times += 1
            return iter([row["text"] + " More." * (self.times > 1) for row in ROWS])

    with pytest.raises(InputError, match=r"texts, row 1: not what it was at the first reading"):
        prepare(Changing())


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a text.", "texts: expected a list of texts or of rows, .* got str; files are named with inputs="),
        ({"text": ["a"], "id": ["b"]}, "expected a list of texts .* got dict"),
        (datasets.DatasetDict(), "one split of a Dataset, got DatasetDict"),
        (7, "got int"),
        (["One. Two.", 3], "texts, row 2: field 'text' is no text but 3"),
        ([{"body": "One. Two."}], "texts, row 1: no field 'text'.*'body'"),
        (datasets.Dataset.from_list([{"body": "One. Two."}]), "texts, row 1: no field 'text'.*'body'"),
        ([{"id": "a", "text": "One. Two."}] * 2, "texts, row 2: id 'a' is also that of texts, row 1"),
        ([], "texts: holds no document"),
    ],
)
def test_what_are_no_texts_is_named(prepare: Callable[..., PreparedCorpus], texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(texts)


def test_texts_or_files(prepare: Callable[..., PreparedCorpus]) -> None:
    with pytest.raises(InputError, match="both texts and inputs"):
        prepare(["One. Two."], inputs="rows.jsonl")
    with pytest.raises(TypeError, match="inputs"):
        prepare()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("pretrain_planner", config.PlannerConfig), ("train", config.TrainConfig),
        ("plan_budget", config.PlanBudgetConfig), ("audit", config.AuditConfig),
        ("audit_probe", config.AuditProbeConfig),
        ("evaluate", config.EvaluateConfig), ("generate", config.GenerateConfig),
    ],
)  # fmt: skip
def test_functions_show_the_commands_settings(name: str, settings: type) -> None:
    function = getattr(planlm, name)
    assert function.__name__ == name and settings.__doc__ in function.__doc__
    assert list(inspect.signature(function).parameters) == [field.name for field in dataclasses.fields(settings)]


def test_settings_are_checked_as_flags_are() -> None:
    with pytest.raises(InputError, match="--steps 0: expected at least 1"):
        planlm.train(corpus="corpus", out="run", steps=0)
    with pytest.raises(TypeError, match="setps"):
        planlm.train(corpus="corpus", out="run", setps=3)  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"^missing"):
        planlm.train(corpus="missing", out="run")


def test_functions_run_what_the_commands_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same function of the same settings: what a command does stands in two tables."""
    import planlm.cli

    for name in ("pretrain-planner", "train", "plan-budget", "evaluate", "generate", "audit", "audit-probe"):
        command, function = planlm.cli.COMMANDS[name], getattr(planlm, name.replace("-", "_"))
        module, attribute = command.run.split(":")
        monkeypatch.setattr(importlib.import_module(module), attribute, lambda settings: settings)
        needed = {one.name: "x" for one in dataclasses.fields(command.config) if one.default is dataclasses.MISSING}
        assert function(**needed) == command.config(**needed)
