"""One HTML page from run directories: self-contained, readable offline, in light and in dark."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from planlm.config import ReportConfig
from planlm.errors import InputError
from planlm.files import write_text
from planlm.report.actions import load_actions
from planlm.report.commands import commands
from planlm.report.generation import (
    describe_generation,
    describe_steering,
    generation_cells,
    generation_difference_cells,
    steering_cells,
)
from planlm.report.plots import (
    SERIES,
    actions_figure,
    breakdown_figure,
    calibration_figure,
    curves_figure,
    perplexity_figure,
    to_svg,
)
from planlm.report.results import SPLITS, Run, compare_runs, load_runs
from planlm.report.tables import (
    FORGETTING_HEADINGS,
    PLANNER_METRICS,
    ROW_HEADINGS,
    describe,
    forgetting_cells,
    format_cost,
    row_cells,
)
from planlm.selections import SELECTIONS

SHOWN_ACTIONS = 24
"""Of a corpus' actions that stand on the page at once, the most common; the others behind a click."""


def write_report(config: ReportConfig) -> Path:
    """Write the page.

    Args:
        config: run directories and the page's path.

    Returns:
        The page that was written.

    Raises:
        InputError: a path that is no run directory, a result that cannot be read, or no folder to write to.
    """
    out = Path(config.out)
    if out.is_dir():
        raise InputError(f"{out}: is a folder; expected the page's file name, such as {out / 'report.html'}")
    runs = load_runs(config.runs)
    page = render(runs, load_actions(runs))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page.encode("utf-8", "backslashreplace").decode())  # JSON can hold halves of characters
    return out


def render(runs: list[Run], actions: dict[str, list[dict[str, Any]] | None] | None = None) -> str:
    """The page's text. Everything that comes from a run is escaped; only our own plots are not.

    Args:
        runs: to show.
        actions: what `load_actions` gives.
    """
    labels = {
        corpus: {one["action"]: one["label"] for one in described or ()}
        for corpus, described in (actions or {}).items()
    }
    corpora = [
        {
            "path": corpus,
            "command": f"planlm actions {shlex.quote(corpus)}",
            "actions": described,
            "labels": labels[corpus],
            "map": described and _svg(actions_figure(described), f"actions-{number}"),
        }
        for number, (corpus, described) in enumerate((actions or {}).items())
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    comparisons = [
        {
            "result": result,
            "plot": _svg(perplexity_figure(result), f"compare-{result['split']}"),
            "breakdown": (figure := breakdown_figure(result)) and _svg(figure, f"compare-parts-{result['split']}"),
        }
        for result in (compare_runs(runs, split) for split in SPLITS)
        if result is not None
    ]
    curves = curves_figure({run.name: run.metrics for run in runs})
    return template.render(
        runs=[_describe_run(run, number, labels) for number, run in enumerate(runs)],
        comparisons=comparisons,
        corpora=corpora,
        shown_actions=SHOWN_ACTIONS,
        curves=curves and _svg(curves, "curves"),
        headings=ROW_HEADINGS,
        describe=describe,
        describe_generation=describe_generation,
        describe_steering=describe_steering,
        forgetting_cells=forgetting_cells,
        forgetting_headings=FORGETTING_HEADINGS,
        generation_cells=generation_cells,
        generation_difference_cells=generation_difference_cells,
        format_cost=format_cost,
        row_cells=row_cells,
        steering_cells=steering_cells,
        planner_metrics=PLANNER_METRICS,
    )


def _svg(figure: Any, prefix: str) -> Markup:
    return Markup(to_svg(figure, prefix))  # matplotlib escapes what it is given


def _calibration(planner: dict[str, Any] | None, prefix: str) -> Markup | None:
    bins = (planner or {}).get("calibration")
    return _svg(calibration_figure(bins), prefix) if bins else None


def _describe_run(run: Run, number: int, labels: dict[str, dict[int, str]]) -> dict[str, Any]:
    """What the template shows of a run; `labels` of actions by corpus."""
    folder = shlex.quote(str(run.path))
    corpus = shlex.quote(str(run.config.get("corpus", "CORPUS")))
    return vars(run) | {
        "series": number % len(SERIES),
        "headline": _headline(run),
        "summary": _summary(run) if run.metrics else [],
        "evaluations": [
            {
                "result": result,
                "plot": _svg(perplexity_figure(result), f"run{number + 1}-{split}"),
                "breakdown": (figure := breakdown_figure(result)) and _svg(figure, f"parts{number + 1}-{split}"),
                "calibration": _calibration(result.get("planner"), f"sure{number + 1}-{split}"),
            }
            for split, result in sorted(run.evaluation.items(), key=lambda item: SPLITS.index(item[0]))
        ],
        "calibration": _calibration(run.planner, f"sure{number + 1}"),
        "commands": commands(run),
        "labels": labels.get(str(run.config.get("corpus")), {}),
        "evaluate_command": f"planlm evaluate {folder} --corpus {corpus}",
        "generate_command": f"planlm generate {folder} --prompt 'The town' --show-plan",
    }


def _headline(run: Run) -> str:
    """What was trained, in one sentence."""
    config = run.config
    if run.planner:
        return "A planner, pre-trained on its own to predict the next sentence's action."
    if "selection" not in config:
        return ""
    parts = [
        f"{config.get('lm') or 'The LM of the corpus'}, conditioned on {config['selection']} plans",
        "LM frozen" if config.get("lm_mode") == "freeze" else "LM fine-tuned",
    ]
    if config["selection"] in [name for name, about in SELECTIONS.items() if about.trains_planner]:
        parts.append("planner frozen" if config.get("freeze_planner") else "planner trained jointly")
    return "; ".join(parts) + "."


def _summary(run: Run) -> list[str]:
    """Steps, last loss, tokens per second and minutes of a run, from its last logged line."""
    last = dict(run.metrics[-1])
    if run.planner:
        last.pop("tokens_per_second", None)  # a planner reads sentences
    if last.get("seconds") is not None:
        last["seconds"] /= 60
    shown = {"step": "{:,}", "loss": "{:.4f}", "tokens_per_second": "{:,.0f}", "seconds": "{:.1f}"}
    return [form.format(last[key]) if last.get(key) is not None else "–" for key, form in shown.items()]
