"""An experiment is made once whatever interrupts it, chooses on validation, and compares what is comparable."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from planlm.config import ExperimentConfig
from planlm.errors import InputError
from planlm.experiments import run as experiments
from planlm.experiments.cell import _corpora
from planlm.experiments.pages import tables, write_plots
from planlm.experiments.results import check_budgets, collect
from planlm.experiments.spec import Experiment
from planlm.experiments.tasks import Task
from tests.experiments.conftest import Work, made_up


@pytest.mark.timeout(900)
def test_killed_and_started_again_it_repeats_no_finished_task(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read()
    out, file = tmp_path / "out", str(tmp_path / "tiny.yaml")
    command = [sys.executable, "-m", "planlm", "experiment", file, "--corpus", planted["corpus"], "--out", str(out)]
    process = subprocess.Popen([*command, "--jobs", "2"], stderr=subprocess.DEVNULL)
    while len(records := list(out.glob("cells/*.json"))) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in records}

    config = ExperimentConfig(file=file, corpus=planted["corpus"], out=str(out), jobs=2)
    result = experiments.experiment(config)
    said = capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in records} == finished
    assert not any(json.loads(path.read_text())["name"] + ":" in said for path in records)
    assert len(list(out.glob("cells/*.json"))) == 2 + 2 * 2 * 2  # tokens, planner; two rows, two seeds
    rows = result["backbones"]["lm"]["rows"]
    assert result["missing"] == [] and list(rows) == ["fixed", "joint"]
    assert set(rows["joint"]["plans"]) == {"soft", "uniform"} and rows["joint"]["cost"]["tokens"] > 0
    assert rows["joint"]["cost"]["parameters_added"] > 0
    assert "fixed" in (out / "tables.md").read_text() and (out / "lm-rows.png").stat().st_size > 1000
    assert not list(out.glob("runs/*/model")) and not list(out.glob("runs/*/checkpoints"))

    experiments.experiment(config)
    assert "0 tasks to do, 10 done before" in capsys.readouterr().err


GRID = {"  joint": "  joint: {selection: soft, grid: {temperature: [1, 2, 4]}}"}


def temperature(task: Task) -> float:
    trained = next(need for need in task.needs if need.kind == "train")
    return trained.settings["options"].get("temperature", 1.0)


def test_validation_chooses_and_nothing_else_is_read_on_test(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path
) -> None:
    """The best on validation is the worst on test here."""
    experiment = read(**GRID)

    def nll(task: Task) -> float:
        is_test = task.settings["options"].get("split", "test") == "test"
        return 3.0 + temperature(task) * (1 if is_test else -1) / 10

    work = Work(experiment, planted["corpus"], tmp_path / "out", made_up(nll))
    planned = work.do()
    assert planned.chosen["lm", "joint"]["values"] == {"temperature": 4.0}
    read_on = [task.settings["options"].get("split", "test") for task in work.done if "joint" in task.name
               and task.kind == "evaluate"]  # fmt: skip
    assert read_on == ["validation"] * 3 + ["test"] * 2
    trained = [
        (temperature(task), task.name) for task in work.done if task.kind == "evaluate" and ", test" in task.name
    ]
    assert sorted({value for value, name in trained if "joint" in name}) == [4.0]
    assert planned.later == [] and planned.awaited == set()
    text = tables(collect(experiment, planned, work.store))
    assert "temperature 4.0" in text and "temperature 1.0: 2.9000" in text


def test_split_validation_does_not_read_test(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path
) -> None:
    work = Work(read(seeds="split: validation"), planted["corpus"], tmp_path / "out", made_up(lambda task: 1.0))
    planned = work.do()
    evaluated = [task for task in work.done if task.kind == "evaluate"]
    assert len(evaluated) == 2 and {task.settings["options"]["split"] for task in evaluated} == {"validation"}
    results = collect(work.planning.experiment, planned, work.store)
    assert results["missing"] == [] and results["backbones"]["lm"]["rows"]["joint"]["split"] == "validation"


def test_a_model_that_is_gone_is_trained_again_only_for_a_new_question(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path
) -> None:
    out, result = tmp_path / "out", made_up(lambda task: 3.0)
    work = Work(read(), planted["corpus"], out, result)
    work.do()
    for folder in out.glob("runs/*/model"):
        folder.rmdir()
    again = Work(read(), planted["corpus"], out, result)
    again.do()
    assert again.done == []
    other = {"versus": "  unplanned: {model_of: fixed, plans: [none]}\nversus: fixed"}
    more = Work(read(**other), planted["corpus"], out, result)
    more.do()
    assert sorted(task.kind for task in more.done) == ["evaluate", "evaluate", "train", "train"]


def test_tasks_depend_on_what_decides_them_alone(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path
) -> None:
    def keys(**changes: str) -> dict[str, str]:
        work = Work(read(**changes), planted["corpus"], tmp_path / "out", made_up(lambda task: 3.0))
        return {task.name: task.key for task in work.planning.plan().tasks.values()}

    before = keys()
    same = keys(name="name: other", compare="compare: []")
    assert same == before
    other = keys(**{"  joint": "  joint: {selection: soft, plans: [soft, uniform], lr: 0.5}"})
    changed = {name for name in before if other[name] != before[name]}
    assert changed == {name for name in before if "joint" in name}
    assert not set(keys(planner="planner: {steps: 3, layers: 1}").values()) & {
        key for name, key in before.items() if "seed" in name
    }


def test_rows_that_come_to_the_same_share_their_trainings_whatever_they_are_called(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path
) -> None:
    rho = {
        "  joint": "  joint: {selection: soft}\n  rho: {selection: soft, sweep: {oracle_mix: [0, 1]}, plans: [oracle]}"
    }
    work = Work(read(**rho), planted["corpus"], tmp_path / "out", made_up(lambda task: 3.0))
    work.do()
    assert [task.kind for task in work.done].count("train") == 2 * 3
    renamed = {"  joint": "  other: {selection: soft}", "compare": ""}
    again = Work(read(**renamed), planted["corpus"], tmp_path / "out", made_up(lambda task: 3.0))
    again.do()
    assert again.done == []
    moved = tmp_path / "out" / ".." / "out"
    elsewhere = Work(read(**rho), planted["corpus"], moved, made_up(lambda task: 3.0))
    elsewhere.do()
    assert elsewhere.done == []


def test_other_corpora_come_in_the_tokens_of_the_lm(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="rows: joint: rehearsal other: no corpus of this name under corpora"):
        read(**{"  joint": "  joint: {selection: soft, rehearsal: other, lm_mode: full}"})
    changes = {
        "  joint": "  joint: {selection: soft, rehearsal: other, lm_mode: full, evaluate: {forgetting: other}}",
        "versus": f"corpora: {{other: {{corpus: {planted['corpus']}}}}}\nversus: fixed",
    }
    work = Work(read(**changes), planted["corpus"], tmp_path / "out", made_up(lambda task: 3.0))
    work.do()
    for kind, option in (("train", "rehearsal"), ("evaluate", "forgetting")):
        task = next(each for each in work.done if each.kind == kind and "joint" in each.name)
        assert list(task.settings["corpora"]) == [option]
        assert _corpora(work.store.out, task.settings) == {option: planted["corpus"]}  # which has them already
        assert {need.kind for need in task.needs} >= {"tokens"}


def test_an_lm_can_be_trained_on_another_corpus(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path
) -> None:
    other = shutil.copytree(planted["corpus"], tmp_path / "other")
    changes = {
        "  lm": "  lm: {pretrain: {corpus: more, steps: 2}}",
        "versus": f"corpora: {{more: {{corpus: {other}}}}}\nversus: fixed",
    }
    work = Work(read(**changes), planted["corpus"], tmp_path / "out", made_up(lambda task: 3.0))
    work.do()
    (lm,) = (task for task in work.done if task.kind == "lm")
    assert lm.settings["corpus"] == str(other) and list(lm.settings["contents"]) == [str(other)]
    assert {task.settings["corpus"] for task in work.done if task.kind == "tokens"} == {planted["corpus"]}


def test_a_corpus_that_was_made_here_is_known_by_its_content(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path
) -> None:
    experiment = read(versus="prepare: {inputs: texts, actions: 4}\nversus: fixed")

    def result(task: Task) -> dict[str, Any]:
        if task.kind == "corpus":
            shutil.copytree(planted["corpus"], task.settings["folder"])
        return made_up(lambda task: 3.0)(task)

    works = [Work(experiment, None, tmp_path / "out", result) for _ in range(2)]
    for work in works:
        work.do()
    assert [len(work.done) for work in works] == [11, 0]
    on_it = Work(experiment, planted["corpus"], tmp_path / "out", result)
    on_it.do()
    assert {task.kind for task in on_it.done} <= {"tokens"}
    with pytest.raises(InputError, match="no corpus: give --corpus"):
        Work(read(), None, tmp_path / "out", result).do()


def test_unequal_numbers_of_tokens_are_refused_unless_a_row_says_why(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path
) -> None:
    def tokens(task: Task) -> int:
        return 101 if "joint" in task.name else 100

    work = Work(read(), planted["corpus"], tmp_path / "a", made_up(lambda task: 3.0, tokens))
    with pytest.raises(InputError, match=r"lm, seed 0: row fixed was trained on 100 tokens and row joint on 101"):
        check_budgets(work.do(), work.store)
    free = {"  joint": "  joint: {selection: soft, own_budget: it stops early}"}
    experiment = read(**free)
    work = Work(experiment, planted["corpus"], tmp_path / "b", made_up(lambda task: 3.0, tokens))
    planned = work.do()
    check_budgets(planned, work.store)
    assert "it stops early" in tables(collect(experiment, planned, work.store))


def test_the_test_over_seeds_is_scipys(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path
) -> None:
    values = {("fixed", 0): 3.00, ("fixed", 1): 3.02, ("fixed", 2): 3.05,
              ("joint", 0): 2.90, ("joint", 1): 2.99, ("joint", 2): 2.93}  # fmt: skip

    def nll(task: Task) -> float:
        return next(value for (row, seed), value in values.items() if f": {row}, seed {seed}" in task.name)

    experiment = read(seeds="seeds: [0, 1, 2]")
    work = Work(experiment, planted["corpus"], tmp_path / "out", made_up(nll))
    (compared,) = collect(experiment, work.do(), work.store)["backbones"]["lm"]["compare"]
    fixed, joint = ([values[row, seed] for seed in range(3)] for row in ("fixed", "joint"))
    expected = ttest_rel(joint, fixed)
    assert np.isclose(compared["p"], expected.pvalue) and np.isclose(compared["t"], expected.statistic)
    assert np.allclose(compared["seeds_ci95"], expected.confidence_interval(0.95))
    assert compared["lower"] == 3 and np.isclose(compared["delta"], np.mean(joint) - np.mean(fixed))


def test_tables_show_what_the_lm_has_forgotten_on_the_mean_over_seeds(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path
) -> None:
    def result(task: Task) -> dict[str, Any]:
        after = 3.25 if "seed 1" in task.name else 3.75
        found = {"before": 3.0, "after": after, "delta": after - 3.0, "ci95": [0.1, 1.0]}
        return {**made_up(lambda task: 3.0)(task), "forgetting": {**found, "corpus": "a/b", "trained_on": found}}

    experiment = read(
        evaluate="evaluate: {window: 16, forgetting: other}",
        versus=f"corpora: {{other: {{corpus: {planted['corpus']}}}}}\nversus: fixed",
    )
    work = Work(experiment, planted["corpus"], tmp_path / "out", result)
    results = collect(experiment, work.do(), work.store)
    text = " ".join(tables(results).split())
    assert "| joint | other | 3.0000 | 3.5000 | +0.5000 | 3.0000 | 3.5000 | +0.5000 |" in text
    write_plots(results, tmp_path)
    assert (tmp_path / "lm-forgetting.png").stat().st_size > 1000


def test_partial_tables_say_what_is_missing(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path
) -> None:
    experiment = read()
    work = Work(experiment, planted["corpus"], tmp_path / "out", made_up(lambda task: 3.0))
    for most in (0, 4, 2):
        results = collect(experiment, work.do(most), work.store)
        assert "Missing so far" in tables(results)
    assert results["missing"] == ["lm: fixed, seed 1", "lm: joint, seed 1"]


def test_other_folders_and_other_experiments_are_refused(
    read: Callable[..., Experiment], planted: dict[str, str], tmp_path: Path
) -> None:
    experiment = read()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files; choose another --out"):
        experiments._open(tmp_path / "mine", experiment)
    experiments._open(tmp_path / "out", experiment)
    with pytest.raises(InputError, match="holds the experiment tiny; choose another --out"):
        experiments._open(tmp_path / "out", read(name="name: other"))
