"""What a run directory holds, read for a report: nothing here needs the model, torch or the corpus."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planlm.errors import InputError
from planlm.evaluation.breakdown import POSITIONS, SplitScores, by_length, by_position
from planlm.evaluation.significance import DocumentScores, compare_rows
from planlm.files import read_json
from planlm.flat_yaml import read_flat
from planlm.report.generation import GENERATION_METRICS
from planlm.report.shapes import misfit
from planlm.report.tables import PLANNER_METRICS

CONFIG, METRICS, PLANNER = "config.yaml", "metrics.jsonl", "planner_metrics.json"
EVALUATION, GENERATION = "evaluation.json", "generation.json"
GENERATION_EVALUATION = "generation_evaluation.json"
SPLITS = ("test", "validation", "train")
LOGGED = (
    "lm_loss",
    "validation_loss",
    "planner_loss",
    "planner_accuracy",
    "planner_entropy",
    "loss",
    "tokens_per_second",
    "seconds",
)
"""What is shown of lines of metrics.jsonl, besides the step."""

LARGEST_NLL = 700.0
"""Nats per token; float64 ends at a perplexity of exp(709)."""

_PLANNER: dict[str, Any] = {"num_actions": int, "sentences": int, **{f"{key}?": float for key, _ in PLANNER_METRICS}}
_PLANNER["calibration?"] = [{"confidence": float, "accuracy": float, "sentences": int}]
_EXPECTED = [{"action": int, "probability": float}]
_EXAMPLE = {"id": str, "sentences": [{"sentence": str, "action": int, "expected": _EXPECTED}]}
_BUCKETS = [{"bucket": str, "rows": [{"plan": str, "delta": float, "ci95": (None, [float])}]}]
_FORGOTTEN = {"before": float, "after": float, "delta": float, "ci95": (None, [float]), "documents": int}
_COST = {"parameters": {"*": int}, "selection": str, "seconds_per_1000_tokens": {"*": float}}
_RESULT = {
    "split": str, "window": int, "stride": int, "tokens": int, "documents": int, "versus": str,
    "rows": [
        {"plan": str, "perplexity": float, "delta": float, "ci95": (None, [float]), "tokens": int,
         "documents": int, "verdict": str}
    ],
    "scores": {"tokens": [int], "nll": {"*": [float]}, "position_tokens?": [[int]], "position_nll?": {"*": [[float]]}},
    "planner?": (None, _PLANNER), "by_position?": _BUCKETS, "by_length?": _BUCKETS,
    "cost?": _COST, "example?": _EXAMPLE,
    "forgetting?": {"corpus": str, "split": str, **_FORGOTTEN, "trained_on": _FORGOTTEN},
}  # fmt: skip
_GENERATION = {
    "prompt": str, "text": str, "selection": str,
    "plan": [{"sentence": str, "forced": (None, int), "actions": [{"action": int, "probability": float}]}],
}  # fmt: skip
_METRICS = {key: (None, float) for key, _, _ in GENERATION_METRICS}
_DIFFERENCE = {"delta": (None, float), "ci95": (None, [float]), "verdict": str}
_DIFFERENCES = {key: _DIFFERENCE for key, _, _ in GENERATION_METRICS}
_VALUE = {"value": float, "ci95": (None, [float])}
_FOLLOWING = {"steered": _VALUE, "unsteered": _VALUE, "difference": _VALUE, "chance": float}
_STEERING = {
    "selection": str, "sentences": {"steered": int, "unsteered": int}, "hits": _FOLLOWING, "ranks": _FOLLOWING,
}  # fmt: skip
_GENERATED = {
    "prompts": int, "split": str, "max_new_tokens": int, "prompt_sentences": int, "temperature": float, "top_p": float,
    "seed": int, "clusters": int, "features": str, "versus": str, "human": _METRICS,
    "rows": [{"plan": str, "metrics": _METRICS, "differences": (None, _DIFFERENCES)}], "steering?": _STEERING,
}  # fmt: skip
_LINE = {"step": int, **{f"{key}?": (None, float) for key in LOGGED}}
"""Shapes of what is read, as `misfit` takes them."""

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
        generated: results of `planlm evaluate-generation` by split.
    """

    name: str
    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    planner: dict[str, Any]
    evaluation: dict[str, dict[str, Any]]
    generation: dict[str, Any]
    generated: dict[str, dict[str, Any]]


def load_runs(paths: Sequence[str]) -> list[Run]:
    """Read run directories.

    Raises:
        InputError: a path that is no run directory, or a file in one that cannot be read.
    """
    folders = [Path(path) for path in paths]
    names = [folder.resolve().name for folder in folders]
    return [
        _load_run(name if names.count(name) == 1 else str(folder), folder)
        for name, folder in zip(names, folders, strict=True)
    ]


def compare_runs(runs: Sequence[Run], split: str) -> dict[str, Any] | None:
    """The table across runs: every run under the plan it was trained with, on the documents that all share.

    Differences refer to the run trained with `fixed`, or to the first run where there is none. A run whose LM stayed
    frozen also gives the row of the LM without a plan, once.

    Returns:
        What `format_rows`, `perplexity_figure` and `breakdown_figure` take, with the names of runs that could not be
        compared in `left_out`; None where fewer than two runs can be.
    """
    usable = [run for run in runs if _trained_plan(run) in run.evaluation.get(split, _NONE)["scores"]["nll"]]
    comparable = [run for run in usable if _tokens(run, split) == _tokens(usable[0], split)]
    if len(comparable) < 2:
        return None
    scores: dict[str, DocumentScores] = {}
    versus, kept = "", [run.evaluation[split]["scores"] for run in comparable]
    for run in comparable:
        plan = _trained_plan(run)
        if run.config.get("lm_mode") == "freeze" and "none" in run.evaluation[split]["scores"]["nll"]:
            scores.setdefault("no plan", _scores(run, split, "none"))
        label = run.name if plan in run.name else f"{run.name} ({plan})"
        scores[label] = _scores(run, split, plan)
        if not versus or plan == "fixed":
            versus = label
    first = comparable[0].evaluation[split]
    parts = {"by_length": by_length(scores, versus)}
    if kept[0].get("position_tokens") and all(one.get("position_tokens") == kept[0]["position_tokens"] for one in kept):
        split_scores = {name: score for name, score in scores.items() if isinstance(score, SplitScores)}
        parts["by_position"] = by_position(split_scores, versus)
    return {
        **{key: first[key] for key in ("split", "window", "stride", "tokens", "documents")},
        "versus": versus,
        "rows": compare_rows(scores, versus),
        **parts,
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
    if documents.get("position_nll"):
        return SplitScores.of_kept(documents, plan)
    return DocumentScores(np.asarray(documents["nll"][plan]), np.asarray(documents["tokens"], dtype=np.int64))


def _load_run(name: str, folder: Path) -> Run:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run directory")
    if not any(
        (folder / file).exists() for file in (CONFIG, METRICS, PLANNER, EVALUATION, GENERATION, GENERATION_EVALUATION)
    ):
        raise InputError(f"{folder}: holds no results; expected a run directory of planlm train or pretrain-planner")
    return Run(
        name=name,
        path=folder,
        config=_read_config(folder / CONFIG),
        metrics=_read_lines(folder / METRICS),
        planner=_read_object(folder / PLANNER, _PLANNER | {"split": str}),
        evaluation=_read_evaluation(folder / EVALUATION),
        generation=_read_object(folder / GENERATION, _GENERATION),
        generated=_read_object(folder / GENERATION_EVALUATION, {"*": _GENERATED}),
    )


def _read_evaluation(path: Path) -> dict[str, Any]:
    content = read_json(path) if _there(path) else {}
    for split, result in content.items():
        fault = misfit(result, _RESULT) or _contradiction(split, result)
        if fault is not None:
            raise InputError(
                f"{path}: {split!r} is no result of planlm evaluate ({fault}); delete the file and evaluate again"
            )
    return content


def _contradiction(split: str, result: dict[str, Any]) -> str | None:
    """What the parts of a result do not agree in."""
    rows, tokens = result["rows"], result["scores"]["tokens"]
    plans = [row["plan"] for row in rows]
    if split not in SPLITS or result["split"] != split:
        return "no such split"
    references = [row["plan"] for row in rows if row["verdict"] == "reference"]
    if references != [result["versus"]] or len(set(plans)) < len(rows):
        return f"rows: expected every plan once, and {result['versus']!r} as the only reference"
    buckets = [bucket["rows"] for key in ("by_position", "by_length") for bucket in result.get(key, [])]
    if any([row["plan"] for row in inside] != plans for inside in buckets):
        return "by_position, by_length: expected the plans of the rows in each bucket"
    for row in itertools.chain(rows, *buckets):
        if row.get("perplexity", 1) <= 0 or any(
            abs(nats) > LARGEST_NLL for nats in (row["delta"], *(row["ci95"] or ()))
        ):
            return f"rows: {row['plan']!r} has metrics that cannot be"
        if row["ci95"] is not None and len(row["ci95"]) != 2:
            return f"rows: {row['plan']!r} has an interval without two ends"
    if not sum(tokens):
        return "scores: no tokens"
    for plan, nll in result["scores"]["nll"].items():
        if len(nll) != len(tokens) or not 0 <= sum(nll) / sum(tokens) < LARGEST_NLL:
            return f"scores: those of {plan!r} do not fit the tokens"
    return _position_fault(result["scores"])


def _position_fault(scores: dict[str, Any]) -> str | None:
    """What scores by position, which files of earlier versions do not have, do not agree in with those of documents."""
    if scores.keys() <= {"tokens", "nll"}:
        return None
    tables = {"": scores.get("position_tokens", []), **scores.get("position_nll", {})}
    for plan in ("", *scores["nll"]):
        totals = scores["nll"][plan] if plan else scores["tokens"]
        if len(tables.get(plan, [])) != len(totals) or any(
            len(row) != len(POSITIONS) or min(row) < -0.01 or abs(sum(row) - total) > 0.01 + 1e-6 * total
            for row, total in zip(tables[plan], totals, strict=True)
        ):
            return f"scores: those by position do not add up to those of documents under {plan!r}"
    return None


def _there(path: Path) -> bool:
    """Whether there is such a file. Raises InputError for a folder, and for a pipe, which would be waited for."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a file; delete it")
    return path.exists()


def _read_object(path: Path, shape: Any) -> dict[str, Any]:
    """The object in a JSON file, checked against its shape; empty where there is no file."""
    content = read_json(path) if _there(path) else {}
    if content and (fault := misfit(content, shape)) is not None:
        raise InputError(f"{path}: {fault}; delete it and make it again")
    return content


def _read_config(path: Path) -> dict[str, Any]:
    content = read_flat(path) if _there(path) else {}
    for key, value in content.items():
        is_mix = key == "mix" and isinstance(value, list) and len(value) < 100 and all(type(it) is str for it in value)
        if isinstance(value, list) and not is_mix:  # shown, a few lines of these can become gigabytes
            raise InputError(f"{path}: {key}: expected one value, got a list")
    return content


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not _there(path):
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line, parse_constant=lambda name: None)  # NaN: as if it had not been logged
        except (ValueError, RecursionError):
            if number == len(lines):  # a run that is being written, or was killed while it wrote
                break
            raise InputError(f"{path}:{number}: not valid JSON; delete the line") from None
        if (fault := misfit(content, _LINE)) is not None:
            raise InputError(f"{path}:{number}: {fault}; delete the line")
        objects.append(content)
    return objects
