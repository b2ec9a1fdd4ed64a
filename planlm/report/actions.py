"""What the actions of the runs' corpora mean, as `planlm actions` has left it in each corpus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planlm.errors import InputError
from planlm.files import read_json
from planlm.report.results import Run
from planlm.report.shapes import misfit

DESCRIBED = "actions.json"

_SHAPE = {
    "actions": [
        {
            "action": int, "label": str, "sentences": int, "share": float, "terms": [str], "examples": [str],
            "followed_by": [{"action": int, "share": float}], "position": [float],
        }
    ]
}  # fmt: skip


def load_actions(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]] | None]:
    """Actions of each corpus that a run was trained on, by the path that the run has; None where nobody described them.

    A corpus that is not where it was is left out.

    Raises:
        InputError: a file that `planlm actions` has not written.
    """
    found: dict[str, list[dict[str, Any]] | None] = {}
    for corpus in dict.fromkeys(str(run.config["corpus"]) for run in runs if run.config.get("corpus")):
        path = Path(corpus) / DESCRIBED
        if path.is_file():
            found[corpus] = _read(path)
        elif Path(corpus).is_dir():
            found[corpus] = None
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    content = read_json(path)
    fault = misfit(content, _SHAPE)
    actions: list[dict[str, Any]] = content["actions"] if fault is None else []
    if fault is None and not actions:
        fault = "no action"
    if fault is None and sorted(one["action"] for one in actions) != list(range(len(actions))):
        fault = "expected every action once"
    if fault is None and any(len(one["position"]) != 2 for one in actions):
        fault = "expected positions of two numbers"
    if fault is None and any(then["action"] >= len(actions) for one in actions for then in one["followed_by"]):
        fault = "followed_by names actions that there are not"
    if fault is not None:
        raise InputError(f"{path}: {fault}; delete it, and `planlm actions {path.parent}` writes it again")
    return actions
