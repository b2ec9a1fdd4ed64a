"""What an experiment still has to do: tasks, each known by a hash of its options and of the tasks that it needs.

    corpus → lm → tokens (the corpus in the LM's) → train → evaluate on validation → choose → train → evaluate on test
           → planner                              ↗

All follows from the file and the records of finished tasks, so nothing else has to survive a kill.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from planlm import __version__
from planlm.config import CommandConfig, EvaluateConfig, PlannerConfig, PrepareConfig, SmallLMConfig, TrainConfig
from planlm.corpus.store import MANIFEST, PreparedCorpus
from planlm.errors import InputError
from planlm.experiments.record import read_record
from planlm.experiments.spec import CORPUS_OPTIONS, Backbone, Experiment, Row

RECORDS = "cells"
"""Folder of the records of finished tasks."""


FOLDERS = {"lm": "lms", "tokens": "tokens", "planner": "planners", "train": "runs", "evaluate": "runs"}
"""Where the folders of tasks are."""


@dataclass(frozen=True)
class Task:
    """Something for a process of its own.

    Attributes:
        key: hash of what decides its result.
        kind: "corpus", "lm", "tokens", "planner", "train" or "evaluate".
        name: for people.
        backbone: that it is of, if any; tasks of the same kind and backbone take about as long.
        settings: what the process is told.
        needs: tasks whose records it reads.
        folder: where it works, alone.
    """

    key: str
    kind: str
    name: str
    backbone: str
    settings: dict[str, Any]
    needs: tuple[Task, ...]
    folder: str


@dataclass
class Planned:
    """All tasks that are known by now.

    Attributes:
        tasks: by key, each behind what it needs.
        trains, reported: keys of the tasks of each (backbone, row, seed).
        budgets: of each (backbone, seed) the rows by the key of their training, for the equality of their tokens.
        chosen: for rows with a grid, by (backbone, row): `values`, and `validation`, the mean NLL of each candidate.
        later: kinds and backbones of tasks that depend on a choice which is still to be made.
        awaited: keys of trained models that such a choice may ask for.
    """

    tasks: dict[str, Task] = field(default_factory=dict)
    trains: dict[tuple[str, str, int], str] = field(default_factory=dict)
    reported: dict[tuple[str, str, int], str] = field(default_factory=dict)
    budgets: dict[tuple[str, int], dict[str, str]] = field(default_factory=dict)
    chosen: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    later: list[tuple[str, str]] = field(default_factory=list)
    awaited: set[str] = field(default_factory=set)

    def add(self, task: Task) -> Task:
        """Take a task in, behind what it needs."""
        for needed in task.needs:
            self.add(needed)
        return self.tasks.setdefault(task.key, task)


class Store:
    """The folder of an experiment: records of finished tasks, and the models that are there."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._records: dict[str, dict[str, Any]] = {}

    def path(self, key: str) -> Path:
        """The file of a record."""
        return self.out / RECORDS / f"{key}.json"

    def record(self, key: str) -> dict[str, Any] | None:
        """What a finished task has left; None where it is not finished."""
        if key not in self._records and self.path(key).exists():
            self._records[key] = read_record(self.path(key))
        return self._records.get(key)

    def forget(self, key: str) -> None:
        """A task is to be done again: its model is asked for and is not there any more."""
        self._records.pop(key, None)
        self.path(key).unlink(missing_ok=True)

    def has_product(self, task: Task) -> bool:
        """Whether what a finished task has made is still there; an evaluation makes nothing but its record."""
        if task.kind == "train":
            return self.model(task).is_dir()
        if task.kind == "tokens" and "splits" not in (self.record(task.key) or {}).get("result", {}):
            return True  # the corpus had the LM's tokens
        folder = Path(task.folder) if task.kind == "corpus" else self.out / task.folder
        return task.kind == "evaluate" or folder.is_dir()

    def model(self, task: Task) -> Path:
        """Folder of the model that a task trains."""
        return self.out / task.folder / "model"


class _Source(NamedTuple):
    """A prepared corpus: what identifies it, its folder, and the task that makes it if it is not there."""

    key: str
    folder: Path
    made: Task | None


class Planning:
    """Makes the tasks of an experiment.

    Args:
        experiment: the file.
        corpus: folder of the prepared corpus, in place of the one in the file.
        store: what is finished.

    Raises:
        InputError: a corpus that is neither there nor to be made.
    """

    def __init__(self, experiment: Experiment, corpus: str | None, store: Store) -> None:
        self.experiment, self.store = experiment, store
        main = {"corpus": experiment.corpus, "prepare": experiment.prepare}
        given = {"corpus": corpus, "prepare": None}  # which has to be there
        self._corpora: dict[str, dict[str, Any]] = {"": given if corpus else main, **experiment.corpora}
        self._sources: dict[str, _Source] = {}
        self._lms: dict[str, tuple[str, str, Task | None]] = {}

    def plan(self) -> Planned:
        """The tasks that follow from the file and from what is finished now."""
        self._open()
        planned = Planned()
        for backbone in self.experiment.backbones:
            for row in self.experiment.rows.values():
                self._choose(planned, backbone, row)
        for seed in self.experiment.seeds:
            for backbone in self.experiment.backbones:
                for row in self.experiment.rows.values():
                    self._report(planned, backbone, row, seed)
        return planned

    def _open(self) -> None:
        """Find corpora and LMs; a corpus that has been made meanwhile is known by its content from then on."""
        if not self._sources or any(source.made for source in self._sources.values()):
            self._sources = {name: self._source(name, **each) for name, each in self._corpora.items()}
            self._lms = {backbone.name: self._lm(backbone) for backbone in self.experiment.backbones}

    def _choose(self, planned: Planned, backbone: Backbone, row: Row) -> None:
        """The values of the row's grid with the least NLL on validation; tasks for what is missing to say so."""
        base = self._base_values(planned, backbone, row)
        if base is None:
            return
        found: list[dict[str, Any]] = []
        for values in row.candidates():
            if not row.grid:
                continue
            nll = []
            for seed in self.experiment.tune_seeds:
                task = planned.add(self._evaluate(backbone, row, seed, values, base, "validation"))
                if (record := self.store.record(task.key)) is not None:
                    nll.append(record["result"]["rows"][0]["nll"])
            if len(nll) == len(self.experiment.tune_seeds):
                found.append({"values": values, "nll": float(np.mean(nll))})
        if len(found) == len(row.candidates()):
            best = min(found, key=lambda candidate: candidate["nll"])
            planned.chosen[backbone.name, row.name] = {"values": best["values"], "validation": found}

    def _report(self, planned: Planned, backbone: Backbone, row: Row, seed: int) -> None:
        base, chosen = self._base_values(planned, backbone, row), planned.chosen.get((backbone.name, row.name))
        if base is None or (row.grid and chosen is None):
            planned.later += [("train", backbone.name)] * (not row.model_of) + [("evaluate", backbone.name)]
            trained = self.experiment.base(row)
            for values in trained.candidates():
                planned.awaited.add(self._train(backbone, trained, seed, values).key)
            return
        task = planned.add(
            self._evaluate(backbone, row, seed, chosen["values"] if chosen else {}, base, self.experiment.split, chosen)
        )
        (train,) = (needed for needed in task.needs if needed.kind == "train")
        planned.reported[backbone.name, row.name, seed] = task.key
        planned.trains[backbone.name, row.name, seed] = train.key
        if not self.experiment.base(row).own_budget:
            planned.budgets.setdefault((backbone.name, seed), {})[row.name] = train.key

    def _base_values(self, planned: Planned, backbone: Backbone, row: Row) -> dict[str, Any] | None:
        """The chosen values of the row whose model this one evaluates; None while they are open."""
        if row.model_of is None or not self.experiment.rows[row.model_of].grid:
            return {}
        chosen = planned.chosen.get((backbone.name, row.model_of))
        return chosen["values"] if chosen else None

    def _source(self, name: str, corpus: str | None, prepare: dict[str, Any] | None) -> _Source:
        if prepare is None and corpus is None:
            raise InputError("no corpus: give --corpus, or corpus: or prepare: in the file")
        if prepare is None or (corpus and (Path(corpus) / MANIFEST).is_file()):
            assert corpus is not None
            return self._there(name, Path(corpus))
        options = _changed(PrepareConfig, prepare)
        key = _key("corpus", options)
        folder = Path(corpus) if corpus else self.store.out / "corpora" / f"{name or 'corpus'}-{key[:8]}"
        if (folder / MANIFEST).is_file() and self.store.record(key) is not None:
            return self._there(name, folder)
        settings = {"prepare": options, "folder": str(folder)}
        return _Source(key, folder, Task(key, "corpus", f"corpus {name}".strip(), "", settings, (), str(folder)))

    def _contents(self, name: str) -> dict[str, Any]:
        """For a task that reads this corpus: what it holds, where that is known."""
        source, folder, made = self._sources[name]
        return {"contents": {} if made else {str(folder): source}}

    def _there(self, name: str, folder: Path) -> _Source:
        """A corpus that is there; the one that rows are trained on needs documents for all that is asked of it."""
        corpus = PreparedCorpus.load(folder)
        uses = {"train": "are trained on", self.experiment.split: "are compared on"}
        if any(row.grid for row in self.experiment.rows.values()):
            uses["validation"] = "with grid are chosen on"
        for split, use in uses.items() if not name else ():
            if not corpus.manifest.splits[split]["documents"]:
                raise InputError(
                    f"{folder}: has no document in the {split} split, which rows {use}; prepare one that has, by more "
                    "--inputs, --validation-fraction or --test-fraction"
                )
        return _Source(corpus.fingerprint, folder, None)

    def _lm(self, backbone: Backbone) -> tuple[str, str, Task | None]:
        """An LM: what identifies it, its name or folder, and the task that trains it if need be."""
        if backbone.pretrain is None:
            assert backbone.lm is not None
            return _fingerprint(backbone.lm), backbone.lm, None
        source, folder, made = self._sources[backbone.pretrain_corpus]
        options = _changed(
            SmallLMConfig, {name.name: getattr(backbone.pretrain, name.name) for name in fields(backbone.pretrain)}
        )
        identity = {"pretrain": options, "corpus": source}
        settings = {"pretrain": options, "corpus": str(folder), **self._contents(backbone.pretrain_corpus)}
        task = _task("lm", f"{backbone.name}: pre-training", backbone.name, settings, (made,), identity)
        return task.key, str(self.store.out / task.folder), task

    def _tokens(self, backbone: Backbone, name: str) -> Task:
        source, folder, made = self._sources[name]
        lm_key, lm, lm_task = self._lms[backbone.name]
        title = f"{backbone.name}: corpus {name}".strip()
        settings = {"corpus": str(folder), "lm": lm, **self._contents(name)}
        identity = {"corpus": source, "lm": lm_key}
        return _task("tokens", title, backbone.name, settings, (made, lm_task), identity)

    def _planner(self, row: Row, seed: int) -> Task | None:
        if row.planner is None:
            return None
        source, folder, made = self._sources[""]
        seed = seed if self.experiment.planner_per_seed else self.experiment.seeds[0]
        options = _changed(PlannerConfig, {**self.experiment.planner, **row.planner, "seed": seed})
        settings = {"options": options, "corpus": str(folder), **self._contents("")}
        identity = {"options": options, "corpus": source}
        return _task("planner", f"planner, seed {seed}", "", settings, (made,), identity)

    def _train(self, backbone: Backbone, row: Row, seed: int, values: dict[str, Any]) -> Task:
        options = {**self.experiment.train_options(backbone, row, values), "seed": seed}
        tokens, others = self._tokens(backbone, ""), self._others(backbone, options)
        planner = self._planner(row, seed)
        lm_key, lm, lm_task = self._lms[backbone.name]
        settings: dict[str, Any] = {
            "options": _changed(TrainConfig, options),
            "corpora": {name: other.key for name, other in others.items()},
            "lm": lm,
            "tokens": tokens.key,
            "planner": planner.key if planner else None,
        }
        title = f"{backbone.name}: {row.name}{_shown(values)}, seed {seed}"
        identity = {**settings, "lm": lm_key}  # and not where it is
        needs = (tokens, *others.values(), planner, lm_task)
        settings |= _sources(tokens, *others.values())
        return _task("train", title, backbone.name, settings, needs, identity)

    def _evaluate(
        self, backbone: Backbone, row: Row, seed: int, values: dict[str, Any], base: dict[str, Any], split: str,
        chosen: dict[str, Any] | None = None,
    ) -> Task:  # fmt: skip
        trained = self.experiment.base(row)
        train = self._train(backbone, trained, seed, base if row.model_of else values)
        options = self.experiment.evaluate_options(backbone, row, values)
        tokens, others = self._tokens(backbone, ""), self._others(backbone, options)
        settings: dict[str, Any] = {
            "options": _changed(EvaluateConfig, {**options, "split": split}),
            "corpora": {name: other.key for name, other in others.items()},
            "tokens": tokens.key,
            "train": train.key,
        }
        title = f"{backbone.name}: {row.name}{_shown(values)}, seed {seed}, {split}"
        needs = (train, tokens, *others.values())
        task = _task("evaluate", title, backbone.name, settings, needs, identity=settings)
        settings |= {"chosen": chosen, **_sources(tokens, *others.values())}
        return replace(task, settings=settings, folder=train.folder)

    def _others(self, backbone: Backbone, options: dict[str, Any]) -> dict[str, Task]:
        """The tasks that make the other corpora which options name, by the option."""
        return {name: self._tokens(backbone, options[name]) for name in CORPUS_OPTIONS if options.get(name)}


def pending(planned: Planned, store: Store) -> list[Task]:
    """Tasks to be done, each behind what it needs; among them finished ones whose product is gone and asked for."""
    todo: list[Task] = []
    users: dict[str, list[str]] = {}  # tasks to be done, by what they need
    for task in reversed(planned.tasks.values()):
        is_gone = task.key in users and store.record(task.key) is not None and not store.has_product(task)
        # In this order: another rank deletes a model once its evaluations have their records.
        if is_gone and any(store.record(user) is None for user in users[task.key]):
            store.forget(task.key)
        if store.record(task.key) is None:
            todo.append(task)
            for needed in task.needs:
                users.setdefault(needed.key, []).append(task.key)
    return todo[::-1]


def _sources(*tokens: Task) -> dict[str, Any]:
    """For a task that reads corpora in an LM's tokens: where each was made from, and what that holds."""
    contents = [task.settings["contents"] for task in tokens]
    return {
        "sources": {task.key: task.settings["corpus"] for task in tokens},
        "contents": {folder: content for each in contents for folder, content in each.items()},
    }


def _key(kind: str, identity: Any) -> str:
    return hashlib.sha256(json.dumps([__version__, kind, identity], sort_keys=True).encode()).hexdigest()[:16]


def _task(
    kind: str, name: str, backbone: str, settings: dict[str, Any], needs: tuple[Task | None, ...], identity: Any
) -> Task:
    """A task in a folder of its own, which follows from `identity`, what decides its result, and from no name."""
    key = _key(kind, identity)
    needed = {need.key: need for need in needs if need}
    return Task(key, kind, name, backbone, settings, tuple(needed.values()), f"{FOLDERS[kind]}/{key}")


def _changed(config: type[CommandConfig], options: dict[str, Any]) -> dict[str, Any]:
    """Options that differ from the command's defaults: a new option does not make old results others."""
    defaults = {each.name: each.default for each in fields(config)}
    return {name: value for name, value in sorted(options.items()) if value != defaults[name]}


def _fingerprint(lm: str) -> str:
    """What identifies an LM: the content of its folder, or its name."""
    folder = Path(lm)
    if not folder.is_dir():
        return lm
    digests = []
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".txt", ".model") and path.is_file():
            with path.open("rb") as file:
                digests.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _shown(values: dict[str, Any]) -> str:
    return "".join(f", {name} {value}" for name, value in values.items())
