"""Experiments beside others, moved, damaged, or with parts of them gone: told in a line, or done again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError
from planlm.experiments import cell
from planlm.experiments import run as experiments
from planlm.experiments.record import read_record, write_record
from planlm.experiments.spec import Experiment
from planlm.experiments.tasks import Planning, Store, Task
from tests.experiments.conftest import Work, made_up


class Failing:
    """Workers whose first process finds its task taken by another command, and whose others fail."""

    def __init__(self) -> None:
        self.jobs, self.running, self.starts = 1, dict[int, Any](), 0

    @property
    def has_room(self) -> bool:
        return not self.running

    def is_free(self, task: Task) -> bool:
        return True

    def start(self, *tasks: Task) -> None:
        self.starts += 1
        status = cell.BUSY if self.starts == 1 else 2
        self.running[0] = SimpleNamespace(tasks=tasks, process=SimpleNamespace(returncode=status))

    def ended(self) -> list[Any]:
        return [self.running.pop(slot) for slot in list(self.running)]

    def reason(self, work: Any) -> str:
        return "it is wrong"


@pytest.mark.timeout(120)
def test_a_task_that_another_command_left_and_that_then_fails_ends_the_experiment(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "LATER", 0.1)
    experiment, store, workers = read(), Store(tmp_path), Failing()
    planning = Planning(experiment, planted["corpus"], store)
    failed = experiments._Loop(experiment, planning, store, workers).run()  # type: ignore[arg-type]
    assert workers.starts == 3 and len(failed) == 2  # tokens twice, the planner once; what needs them not at all
    assert all(why.endswith(": it is wrong") for why in failed.values())


def test_ranks_may_begin_on_a_folder_at_the_same_time(read: Callable[..., Experiment], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "cells").mkdir(parents=True)
    (out / ".planlm-0123456789ab.partial").write_text("{")  # the mark, as the other one writes it
    experiments._open(out, read())
    assert (out / experiments.MARK).is_file()


def test_a_corpus_may_move_and_so_may_the_experiment(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path
) -> None:
    out, result = tmp_path / "out", made_up(lambda task: 3.0)
    shutil.copytree(planted["corpus"], tmp_path / "a")
    works = [Work(read(), str(tmp_path / "a"), out, result)]
    works[0].do(2)
    (tmp_path / "a").rename(tmp_path / "b")
    out.rename(tmp_path / "moved")
    works.append(Work(read(), str(tmp_path / "b"), tmp_path / "moved", result))
    works[1].do()
    assert len(works[0].done) == 2 and len(works[1].done) == 8
    for task in works[1].done:
        key = task.settings["tokens"]
        write_record(works[1].store.path(key), _record("tokens", {"corpus": str(tmp_path / "a")}))
        assert cell._in_tokens(tmp_path / "moved", key, task.settings) == str(tmp_path / "b")


def test_what_was_made_and_is_gone_is_made_again_where_something_needs_it(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path
) -> None:
    out, result = tmp_path / "out", made_up(lambda task: 3.0)
    Work(read(), planted["corpus"], out, result).do()
    shutil.rmtree(out / "planners")
    again = Work(read(), planted["corpus"], out, result)
    again.do()
    assert again.done == []
    more = Work(read(seeds="seeds: [0, 1, 2]"), planted["corpus"], out, result)
    more.do()
    assert [task.kind for task in more.done].count("planner") == 1


def test_a_damaged_record_is_named_and_never_taken_for_a_result(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    record = _record("train", {"tokens": 1234})
    write_record(path, record)
    assert read_record(path) == record
    for text in ("", "{}", "[]", json.dumps({"kind": "train"}), path.read_text().replace("1234", "1235")):
        path.write_text(text)
        with pytest.raises(InputError, match=r"key\.json: .*delete it"):
            read_record(path)


def test_a_corpus_without_the_splits_that_are_asked_for_is_refused_before_anything_is_trained(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = PreparedCorpus.load(planted["corpus"])
    monkeypatch.setattr(PreparedCorpus, "load", lambda *_: corpus)
    monkeypatch.setitem(corpus.manifest.splits["validation"], "documents", 0)
    Planning(read(), planted["corpus"], Store(tmp_path)).plan()
    tuned = read(**{"  joint": "  joint: {selection: soft, grid: {temperature: [1, 2]}}"})
    with pytest.raises(InputError, match="no document in the validation split, which rows with grid are chosen on"):
        Planning(tuned, planted["corpus"], Store(tmp_path)).plan()
    monkeypatch.setitem(corpus.manifest.splits["test"], "documents", 0)
    with pytest.raises(InputError, match="no document in the test split, which rows are compared on"):
        Planning(read(), planted["corpus"], Store(tmp_path)).plan()


def test_a_corpus_that_changes_under_an_experiment_gives_no_result(planted: dict[str, str]) -> None:
    content = PreparedCorpus.load(planted["corpus"]).fingerprint
    cell._check_contents({planted["corpus"]: content})
    with pytest.raises(InputError, match="has changed since the experiment was started; start it again"):
        cell._check_contents({planted["corpus"]: "other"})


def _record(kind: str, result: dict[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "folder": "f", "seconds": 1.0, "began": "now", "result": result}
