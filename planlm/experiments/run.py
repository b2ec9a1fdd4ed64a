"""`planlm experiment`: everything that a file describes, from a corpus to tables and curves.

What is finished has a record and is never done again; tables are written anew after every cell. Under torchrun each
rank works on what no other does, as do several commands on one folder.
"""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from planlm.config import ExperimentConfig
from planlm.distribution import barrier
from planlm.errors import InputError, MachineError
from planlm.experiments.cell import BUSY
from planlm.experiments.pages import tables
from planlm.experiments.results import RESULTS, TABLES, check_budgets, collect, write_results
from planlm.experiments.spec import Experiment, read_experiment
from planlm.experiments.tasks import RECORDS, Planned, Planning, Store, Task, pending
from planlm.experiments.workers import Work, Workers
from planlm.files import check_own, read_json, write_json
from planlm.ranks import rank, world_size
from planlm.terminal import note

SECONDS = 60.0
"""Between lines about what is running."""

LATER = 5.0
"""Seconds until a task that somebody else works on is looked at again."""

FOLLOWERS = {"lm": "tokens", "train": "evaluate"}
"""Tasks that the same process does next, since they need nothing else: starting one takes seconds."""

MARK = "experiment.json"
"""What makes a folder an experiment's."""


def experiment(config: ExperimentConfig) -> dict[str, Any]:
    """Do all that a file describes and is not done yet.

    Returns:
        What `results.json` holds (docs/experiments.md), and `paths`; None on other ranks than the first.

    Raises:
        InputError: the file or the corpus is wrong, `out` holds something else, or rows saw unequal numbers of tokens.
        MachineError: cells have failed; the others are finished.
        KeyboardInterrupt: once all processes have stopped; the next call goes on from there.
    """
    described = read_experiment(Path(config.file))
    out = Path(config.out or f"experiment-{described.name}")
    _open(out, described)
    store = Store(out)
    planning = Planning(described, config.corpus, store)
    try:
        with Workers(out, config.jobs) as workers:
            failed = _Loop(described, planning, store, workers).run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on from here") from None
    barrier()
    if failed:
        some = "; ".join(list(failed.values())[:3]) + ("; ..." if len(failed) > 3 else "")
        raise MachineError(f"{len(failed)} tasks have failed, {out}/logs has what they said: {some}")
    results = collect(described, planning.plan(), store)
    paths = {"tables": str(out / TABLES), "results": str(out / RESULTS), "plots": str(out / "*.png")}
    return results | {"tables": tables(results), "paths": paths}


def _open(out: Path, described: Experiment) -> None:
    """Make the folder; refuse one that holds something else, or another experiment."""
    check_own(out)
    mark = out / MARK
    if mark.is_file():
        if (before := read_json(mark).get("name")) != described.name:
            raise InputError(f"{out}: holds the experiment {before}; choose another --out")
    elif out.exists() and (not out.is_dir() or any(not _is_ours(path) for path in out.iterdir())):
        raise InputError(f"{out}: holds other files; choose another --out")
    for name in (RECORDS, "logs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    write_json(mark, {"name": described.name})


def _is_ours(path: Path) -> bool:
    """Whether another rank or command may just have made this, which begins on the folder at the same time."""
    return path.name in (RECORDS, "logs", MARK) or path.name.endswith(".partial")


class _Loop:
    """Starts what can start, until nothing is left."""

    def __init__(self, described: Experiment, planning: Planning, store: Store, workers: Workers) -> None:
        self.described, self.planning, self.store, self.workers = described, planning, store, workers
        self.failed: dict[str, str] = {}  # by the task's key
        self._later: dict[str, float] = {}
        self._told = time.monotonic()

    def run(self) -> dict[str, str]:
        """Work until all is done that can be; what failed by its key, and why."""
        planned, todo = self._look()
        if rank() == 0:
            note(f"{self.described.title}: {_count(planned, todo)}")
        while todo:
            self._start(todo)
            if not self.workers.running and not self._later:
                break
            time.sleep(0.2)
            for work in self.workers.ended():
                self._end(work)
            done = [task for task in todo if self.store.record(task.key) is not None]
            if done:
                planned, todo = self._look(done)
                for task in done:
                    self._later.pop(task.key, None)
                    self._note(task, planned, todo)
            elif time.monotonic() - self._told > SECONDS:
                self._tell()
        return {key: why for key, why in self.failed.items() if self.store.record(key) is None}

    def _look(self, done: list[Task] | None = None) -> tuple[Planned, list[Task]]:
        """What is to be done now; new results are written, and models that nobody will ask for go."""
        planned = self.planning.plan()
        todo = list(pending(planned, self.store))
        check_budgets(planned, self.store)
        if rank() == 0:
            if done is None or any(task.kind == "evaluate" for task in done):
                write_results(self.described, planned, self.store)
            self._tidy(planned, todo)
        return planned, todo

    def _start(self, todo: list[Task]) -> None:
        """Start as many processes as there is room for."""
        now = time.monotonic()
        self._later = {key: until for key, until in self._later.items() if until > now}
        for task in todo:
            is_open = task.key not in self.failed and task.key not in self._later
            if is_open and self.workers.has_room and self.workers.is_free(task) and self._is_ready(task, ()):
                followers = (each for each in todo if each.kind == FOLLOWERS.get(task.kind))
                self.workers.start(task, *(each for each in followers if self._is_follower(each, task)))

    def _is_ready(self, task: Task, before: tuple[str, ...]) -> bool:
        return all(needed.key in before or self.store.record(needed.key) is not None for needed in task.needs)

    def _is_follower(self, task: Task, of: Task) -> bool:
        is_next = any(needed.key == of.key for needed in task.needs)
        return is_next and task.key not in self.failed and self._is_ready(task, (of.key,))

    def _end(self, work: Work) -> None:
        """Note why a process has not done all that it was to do."""
        left = [task for task in work.tasks if self.store.record(task.key) is None]
        if work.process.returncode == BUSY:
            self._later |= {task.key: time.monotonic() + LATER for task in left}
        elif left:
            self.failed[left[0].key] = f"{left[0].name}: {self.workers.reason(work)}"
            note(f"FAILED   {self.failed[left[0].key]}")

    def _note(self, task: Task, planned: Planned, todo: list[Task]) -> None:
        record = self.store.record(task.key)
        if record is not None and rank() == 0:
            left = self._left(planned, todo)
            note(f"{task.kind:8} {task.name}: {_outcome(record)}{record['seconds']:.0f} s; {left}")
        self._told = time.monotonic()

    def _left(self, planned: Planned, todo: list[Task]) -> str:
        """How much is left, and about how long that takes, from tasks of the same kind and LM."""
        spent: dict[tuple[str, str], list[float]] = defaultdict(list)
        for task in planned.tasks.values():
            if (record := self.store.record(task.key)) is not None:
                spent[task.kind, task.backbone].append(record["seconds"])
        kinds = [(task.kind, task.backbone) for task in todo] + planned.later
        seconds = 0.0
        for kind in kinds:
            alike = spent[kind] or [one for other, them in spent.items() if other[0] == kind[0] for one in them]
            if not alike:
                return f"{len(kinds)} left"
            seconds += sum(alike) / len(alike)
        jobs = min(self.workers.jobs * world_size(), max(1, len(kinds)))
        return f"{len(kinds)} left, about {_time(seconds / jobs)}" if kinds else "nothing left"

    def _tell(self) -> None:
        for work in self.workers.running.values():
            at = next((task for task in work.tasks if self.store.record(task.key) is None), work.tasks[-1])
            note(f"running  {at.name}: {self.workers.last_line(work) or 'starting'}")
        self._told = time.monotonic()

    def _tidy(self, planned: Planned, todo: Iterable[Task]) -> None:
        """Delete models that are neither kept nor will be evaluated."""
        wanted = {needed.key for task in todo for needed in task.needs} | planned.awaited
        kept = {key for (_, row, _), key in planned.trains.items() if row in self.described.keep}
        for task in planned.tasks.values():
            if task.kind == "train" and task.key not in wanted | kept and self.store.record(task.key) is not None:
                shutil.rmtree(self.store.model(task), ignore_errors=True)


def _count(planned: Planned, todo: list[Task]) -> str:
    done = len(planned.tasks) - len(todo)
    return f"{len(todo) + len(planned.later)} tasks to do" + (f", {done} done before" if done else "")


def _outcome(record: dict[str, Any]) -> str:
    result = record["result"]
    if record["kind"] == "evaluate":
        return "NLL " + ", ".join(f"{row['plan']} {row['nll']:.4f}" for row in result["rows"]) + "; "
    if record["kind"] == "train":
        return f"{result['tokens']:,} tokens; "
    return f"NLL {result['nll']:.4f}; " if record["kind"] == "planner" else ""


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{max(1, round(seconds / 60))} min"
