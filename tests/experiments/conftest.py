"""The planted corpus of the training tests serves here too; files of experiments, and made-up records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planlm.experiments.spec import Experiment, read_experiment
from planlm.experiments.tasks import Planned, Planning, Store, Task, pending
from tests.training.conftest import planted

__all__ = ["planted"]

FILE = """
name: tiny
planner: {steps: 2, layers: 1, per_seed: false}
backbones:
  lm: {lm: LM}
seeds: [0, 1]
train: {steps: 2, batch_size: 2, window: 16, conditioned_layers: 1}
evaluate: {window: 16, bootstrap: 50}
rows:
  fixed: {selection: fixed}
  joint: {selection: soft, plans: [soft, uniform]}
versus: fixed
compare: [[joint, fixed]]
"""


@pytest.fixture
def read(tmp_path: Path, planted: dict[str, str]) -> Callable[..., Experiment]:
    """Reads a file; what is given takes the place of parts of `FILE`."""

    def reads(text: str = FILE, **changes: str) -> Experiment:
        for old, new in changes.items():
            lines = [new if line.startswith(f"{old}:") else line for line in text.splitlines()]
            text = "\n".join(lines)
        path = tmp_path / "tiny.yaml"
        path.write_text(text.replace("LM}", f"{planted['lm']}}}"))
        return read_experiment(path)

    return reads


class Work:
    """An experiment whose tasks are only written down: each gets the record that `result` makes."""

    def __init__(
        self, experiment: Experiment, corpus: str | None, out: Path, result: Callable[[Task], dict[str, Any]]
    ) -> None:
        (out / "cells").mkdir(parents=True, exist_ok=True)
        self.store, self.done, self._result = Store(out), list[Task](), result
        self.planning = Planning(experiment, corpus, self.store)

    def do(self, most: int = 1000) -> Planned:
        """Finish tasks until none is left, in an order that their needs allow; what is planned then."""
        for _ in range(most):
            planned = self.planning.plan()
            todo = list(pending(planned, self.store))
            if not todo:
                break
            task = next(each for each in todo if all(self.store.record(need.key) for need in each.needs))
            if task.kind in ("train", "planner", "lm"):
                (self.store.model(task) if task.kind == "train" else self.store.out / task.folder).mkdir(parents=True)
            assert task.kind != "evaluate" or self.store.model(task).is_dir(), "evaluated without a model"
            self.done.append(task)
            record = {"kind": task.kind, "seconds": 1.0, "began": "now", "result": self._result(task)}
            self.store.path(task.key).write_text(json.dumps(record))
        return self.planning.plan()


def made_up(nll: Callable[[Task], float], tokens: Callable[[Task], int] = lambda task: 100) -> Callable[[Task], Any]:
    """Results of tasks: every plan of an evaluation has this NLL, every training this number of tokens."""

    def result(task: Task) -> dict[str, Any]:
        if task.kind == "train":
            return {"tokens": tokens(task), "seconds": 2.0, "memory": 10**9}
        if task.kind != "evaluate":
            return {"corpus": "corpus"}
        options = task.settings["options"]
        plans, counts = options["plans"].split(","), [10, 20, 30, 40, 50, 60, 70, 80]
        scores = {plan: [(nll(task) + number / 100) * count for count in counts] for number, plan in enumerate(plans)}
        return {
            "split": options.get("split", "test"), "window": 16, "stride": 16, "documents": 8, "tokens": sum(counts),
            "rows": [{"plan": plan, "nll": sum(scores[plan]) / sum(counts)} for plan in plans],
            "scores": {"tokens": counts, "nll": scores}, "planner": {"nll": 1.0},
            "cost": {"parameters": {"lm": 1000, "planner": 20, "codebook": 8, "adapter": 4}},
        }  # fmt: skip

    return result
