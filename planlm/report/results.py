"""What a run directory holds, read for a report: nothing here needs the model, torch or the corpus."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from planlm.errors import InputError
from planlm.evaluation.significance import DocumentScores, compare_rows

CONFIG, METRICS, PLANNER = "config.yaml", "metrics.jsonl", "planner_metrics.json"
EVALUATION, GENERATION = "evaluation.json", "generation.json"

_NONE: dict[str, Any] = {"scores": {"nll": {}}}
"""Stands for the evaluation of a run that has none."""


@dataclass(frozen=True)
class Run:
    """A run directory's results; what is absent is empty.

    Attributes:
        name: the folder's name, made longer where several runs share it.
        path: the folder.
        config: the resolved configuration.
        metrics: lines of metrics.jsonl.
        planner: metrics of `planlm pretrain-planner`.
        evaluation: results of `planlm evaluate` by split.
        generation: a generated text with its plan.
    """

    name: str
    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    planner: dict[str, Any]
    evaluation: dict[str, dict[str, Any]]
    generation: dict[str, Any]


def load_runs(paths: Sequence[str]) -> list[Run]:
    """Read run directories.

    Raises:
        InputError: a path that is no run directory, or a file in one that cannot be read.
    """
    folders = [Path(path) for path in paths]
    names = [folder.resolve().name for folder in folders]
    for place, folder in enumerate(folders):
        if names.count(folder.resolve().name) > 1:
            names[place] = str(folder)
    return [_load_run(name, folder) for name, folder in zip(names, folders, strict=True)]


def compare_runs(runs: Sequence[Run], split: str) -> dict[str, Any] | None:
    """The table across runs: every run under the plan it was trained with, on the documents that all share.

    Differences refer to the run trained with `fixed`, or to the first run where there is none. A run whose LM stayed
    frozen also gives the row of the LM without a plan, once.

    Returns:
        What `format_rows` and `perplexity_figure` take, with the names of runs that could not be compared in
        `left_out`; None where fewer than two runs can be.
    """
    usable = [run for run in runs if _trained_plan(run) in run.evaluation.get(split, _NONE)["scores"]["nll"]]
    comparable = [run for run in usable if _tokens(run, split) == _tokens(usable[0], split)]
    if len(comparable) < 2:
        return None
    scores: dict[str, DocumentScores] = {}
    versus = ""
    for run in comparable:
        plan = _trained_plan(run)
        if run.config.get("lm_mode") == "freeze" and "none" in run.evaluation[split]["scores"]["nll"]:
            scores.setdefault("no plan", _scores(run, split, "none"))
        label = run.name if plan in run.name else f"{run.name} ({plan})"
        scores[label] = _scores(run, split, plan)
        if not versus or plan == "fixed":
            versus = label
    first = comparable[0].evaluation[split]
    return {
        **{key: first[key] for key in ("split", "window", "stride", "tokens", "documents")},
        "versus": versus,
        "rows": compare_rows(scores, versus),
        "left_out": [run.name for run in runs if _trained_plan(run) and run not in comparable],
    }


def _trained_plan(run: Run) -> str:
    return str(run.config.get("selection", ""))


def _tokens(run: Run, split: str) -> tuple[Any, ...]:
    """What two runs must share to be compared: window, stride and the tokens scored of every document."""
    result = run.evaluation[split]
    return result["window"], result["stride"], result["scores"]["tokens"]


def _scores(run: Run, split: str, plan: str) -> DocumentScores:
    documents = run.evaluation[split]["scores"]
    return DocumentScores(np.asarray(documents["nll"][plan]), np.asarray(documents["tokens"], dtype=np.int64))


def _load_run(name: str, folder: Path) -> Run:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run directory")
    if not any((folder / file).exists() for file in (CONFIG, METRICS, PLANNER, EVALUATION, GENERATION)):
        raise InputError(f"{folder}: holds no results; expected a run directory of planlm train or pretrain-planner")
    return Run(
        name=name,
        path=folder,
        config=_read_yaml(folder / CONFIG),
        metrics=_read_lines(folder / METRICS),
        planner=_read_json(folder / PLANNER),
        evaluation=_read_evaluation(folder / EVALUATION),
        generation=_read_json(folder / GENERATION),
    )


def _read_evaluation(path: Path) -> dict[str, Any]:
    content = _read_json(path)
    for split, result in content.items():
        if not isinstance(result, dict) or not {"rows", "scores", "window", "stride"} <= result.keys():
            raise InputError(f"{path}: {split!r} is no result of planlm evaluate; delete the file and evaluate again")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); delete it and make it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}; delete it and make it again")
    return content


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, got {type(content).__name__}")
    return content


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            objects.append(json.loads(line))
        except ValueError:
            if number == len(lines):  # a run that is being written, or was killed while it wrote
                break
            raise InputError(f"{path}:{number}: not valid JSON; delete the line") from None
    return objects
