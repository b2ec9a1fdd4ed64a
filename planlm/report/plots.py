"""Plots: perplexity with paired intervals, and training curves; as PNG files or as SVG for a page.

SVG colours of text and lines are written as CSS variables, so that a plot follows the page into dark mode.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from planlm.errors import InputError
from planlm.files import replacing
from planlm.report.tables import perplexity

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
except ImportError:
    raise InputError("plots and reports need matplotlib: pip install 'planlm[report]'") from None

INK, MUTED, GRID, PAPER = "#1c1c20", "#6b6b76", "#e3e3e8", "#fefefd"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#c2569b", "#b58900", "#4fa3d9", "#8f6bd0", "#7a7a7a")
"""Okabe and Ito's colours, which colour-blind readers can tell apart, darkened where they were pale on white."""

_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    color: f"--series-{number}" for number, color in enumerate(SERIES)
}

CURVES = (
    ("lm_loss", "LM loss (nats per token)"),
    ("validation_loss", "validation loss (nats)"),
    ("planner_loss", "planner loss (nats per sentence)"),
    ("planner_accuracy", "planner accuracy@1"),
    ("planner_entropy", "planner entropy (nats)"),
)
"""Keys of metrics.jsonl that are drawn, with their titles."""

_OUTLIER = 4.0
"""A single row this many times farther from the reference than the next is drawn at the edge, for the others' sake."""

_LEGEND = 100
"""Characters in a line of a figure's legend, with some six for each line's sample."""

_LARGEST = 1e12
"""Perplexity of a model that has diverged beyond drawing."""

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "figure.facecolor": PAPER,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a run may be called $$
}


def perplexity_figure(result: dict[str, Any]) -> Figure:
    """One line per row: its perplexity, and the 95 % interval of its difference to the reference as a bar.

    The interval of the difference in nats, `[low, high]`, is drawn at `perplexity_ref · exp([low, high])`.

    Args:
        result: what `planlm evaluate` writes for a split: `rows`, `versus`, `split`.
    """
    rows = [row | {"perplexity": min(row["perplexity"], _LARGEST), "shown": perplexity(row)} for row in result["rows"]]
    reference = next(row for row in rows if row["plan"] == result["versus"])
    low, high, off_scale = _limits(rows)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 1.25 + 0.42 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(reference["perplexity"], color=MUTED, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
        for height, row in enumerate(rows):
            _draw_row(axes, height, row, reference["perplexity"], edge=off_scale.get(row["plan"]))
        axes.set_xlim(low, high)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [row["plan"] for row in rows])
        axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=10.5)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", linewidth=0.8, zorder=0)
        axes.set_axisbelow(True)
        axes.locator_params(axis="x", nbins=7)
        axes.set_xlabel("perplexity: lower is better")
        axes.set_title(
            f"Perplexity on the {result['split']} split; bars: 95 % interval of the difference to {result['versus']}",
            pad=10,
        )
    return figure


def breakdown_figure(result: dict[str, Any]) -> Figure | None:
    """Differences to the reference by sentence and by length of the document, with their 95 % intervals.

    Args:
        result: what `planlm evaluate` writes for a split.

    Returns:
        The figure, or None for a result without such parts.
    """
    titles = {"by_position": "number of the sentence", "by_length": "tokens of the document"}
    parts = {key: title for key, title in titles.items() if result.get(key)}
    plans = [row["plan"] for row in result["rows"] if row["plan"] != result["versus"]]
    if not parts or not plans:
        return None
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        for axes, (key, title) in zip(panels, parts.items(), strict=True):
            axes.axhline(0, color=MUTED, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
            at = np.arange(len(result[key]))
            for number, (plan, color) in enumerate(zip(plans, itertools.cycle(SERIES), strict=False)):
                rows = [next(row for row in bucket["rows"] if row["plan"] == plan) for bucket in result[key]]
                delta = np.array([row["delta"] for row in rows])
                ends = np.array([row["ci95"] or [row["delta"]] * 2 for row in rows]).T
                beside = at + 0.06 * (number - (len(plans) - 1) / 2)
                axes.plot(beside, delta, "o-", color=color, linewidth=1.4, markersize=4, label=plan)
                axes.vlines(beside, *ends, color=color, linewidth=1.4, alpha=0.5)
            axes.set_xticks(at, [bucket["bucket"] for bucket in result[key]])
            axes.set_xlabel(title)
            axes.grid(axis="y", linewidth=0.8)
        panels[0].set_ylabel(f"nats per token against {result['versus']}")
        columns = max(1, min(4, _LEGEND // (max(map(len, plans)) + 6)))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=columns, frameon=False)
    return figure


def curves_figure(runs: dict[str, Sequence[dict[str, Any]]]) -> Figure | None:
    """Training curves, one panel a quantity and one line a run: logged values faint, their running mean strong.

    Args:
        runs: lines of metrics.jsonl by the run's name.

    Returns:
        The figure, or None where there is nothing to draw.
    """
    panels = [(key, title) for key, title in CURVES if any(len(_series(lines, key)[0]) for lines in runs.values())]
    if not panels:
        return None
    with mpl.rc_context(_STYLE):
        num_rows = math.ceil(len(panels) / 2)
        figure = Figure(figsize=(8.4, 2.6 * num_rows), layout=ConstrainedLayoutEngine(hspace=0.1))
        for number, (key, title) in enumerate(panels, start=1):
            axes = figure.add_subplot(num_rows, 2, number)
            for color, lines in zip(itertools.cycle(SERIES), runs.values(), strict=False):
                steps, values = _series(lines, key)
                axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
                axes.plot(steps, _running_mean(values), color=color, linewidth=1.6)
            axes.set_title(title)
            axes.grid(linewidth=0.8)
            axes.locator_params(nbins=6)
            if number > len(panels) - 2:
                axes.set_xlabel("step")
    return figure


def calibration_figure(bins: Sequence[dict[str, Any]]) -> Figure:
    """How often the planner's first choice is right, by how sure it was; areas by sentences.

    Args:
        bins: `confidence`, `accuracy` and `sentences` of each.
    """
    most = max((one["sentences"] for one in bins), default=1) or 1
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        sure, right = ([one[key] for one in bins] for key in ("confidence", "accuracy"))
        axes.plot(sure, right, color=SERIES[0], linewidth=1.2)
        axes.scatter(sure, right, s=[12 + 160 * one["sentences"] / most for one in bins], color=SERIES[0], alpha=0.6)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("probability of the most probable action")
        axes.set_ylabel("share that is right")
        axes.set_title("Calibration of the planner; dotted: as sure as it is right", pad=10)
        axes.grid(linewidth=0.8)
    return figure


def lines_figure(lines: dict[str, Sequence[dict[str, Any]]], *, x: str, y: str, title: str) -> Figure:
    """Lines through points with error bars.

    Args:
        lines: by name, points with `x`, `delta` and `half_width` of the bar, which may be None.
        x, y: what the axes show.
        title: of the figure.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for color, (name, points) in zip(itertools.cycle(SERIES), lines.items(), strict=False):
            axes.errorbar(
                [point["x"] for point in points], [point["delta"] for point in points],
                yerr=[point["half_width"] or 0.0 for point in points],
                color=color, marker="o", markersize=5, linewidth=1.6, elinewidth=1.2, capsize=3, label=name,
            )  # fmt: skip
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(f"{title}; bars: 95 % interval over seeds", pad=10)
        axes.grid(linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
    return figure


def trade_figure(lines: Mapping[str, Sequence[dict[str, Any]]], *, x: str, y: str, title: str) -> Figure:
    """What one thing costs in another: a point for each row, a line with its values for each sweep.

    Args:
        lines: by name, points with `x`, `y` and `label`, in the order of the line.
        x, y: what the axes show.
        title: of the figure.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 4.6), layout="constrained")
        axes = figure.add_subplot()
        above = itertools.cycle((True, False))  # of neighbouring lines
        for color, (name, points) in zip(itertools.cycle(SERIES), lines.items(), strict=False):
            axes.plot(
                [point["x"] for point in points], [point["y"] for point in points],
                color=color, marker="o", markersize=6, linewidth=1.4, label=name,
            )  # fmt: skip
            lift = 7 if len(points) > 1 and next(above) else -15
            for point in points:
                axes.annotate(
                    point["label"], (point["x"], point["y"]), xytext=(0, lift), textcoords="offset points",
                    color=color, fontsize="small", ha="center",
                )  # fmt: skip
        axes.margins(0.12)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(title, pad=10)
        axes.grid(linewidth=0.8)
        axes.set_axisbelow(True)
        figure.legend(frameon=False, loc="outside right upper")
    return figure


def actions_figure(actions: Sequence[dict[str, Any]]) -> Figure:
    """A map of the actions: similar ones near to each other, as large as they are common, the largest by name.

    A line leads from each action to the one that most often follows it, itself left out; strong where that is frequent.

    Args:
        actions: of each `action`, `label`, `share`, `position` and `followed_by`.
    """
    at = {one["action"]: one["position"] for one in actions}
    largest = max(one["share"] for one in actions) or 1.0
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 6.2), layout="constrained")
        axes = figure.add_subplot()
        for one in actions:
            then = next((each for each in one["followed_by"] if each["action"] != one["action"]), None)
            if then is not None:
                ends = np.array([one["position"], at[then["action"]]]).T
                axes.plot(*ends, color=MUTED, linewidth=0.9, alpha=min(0.9, 0.1 + then["share"]), zorder=1)
        across, up = np.array([one["position"] for one in actions]).T
        widest = min(700, 30_000 / len(actions))  # points squared, so that many leave room between them
        sizes = [10 + widest * one["share"] / largest for one in actions]
        axes.scatter(across, up, s=sizes, color=SERIES[0], alpha=0.55, linewidths=0, zorder=2)
        axes.margins(0.1)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[["left", "bottom"]].set_visible(False)
        _name_largest(axes, actions, sizes)
    return figure


def _name_largest(axes: Axes, actions: Sequence[dict[str, Any]], sizes: Sequence[float]) -> None:
    """Names of actions below their dots, the most common first, as far as there is room.

    A letter takes some .012 by .035 of it, a point of height .0025. Sizes are the dots', in points squared.
    """
    taken: list[tuple[float, float, float]] = []
    for one, size in sorted(zip(actions, sizes, strict=True), key=lambda pair: -pair[0]["share"]):
        (x, y), text = one["position"], f"{one['action']} {one['label']}".strip()
        below = size**0.5 / 2 + 2
        y, wide = y - 0.0025 * below, 0.006 * len(text)
        if all(abs(x - other) > wide + width or abs(y - height) > 0.035 for other, height, width in taken):
            style: dict[str, Any] = {"fontsize": 8, "color": INK, "zorder": 3, "ha": "center", "va": "top"}
            axes.annotate(text, one["position"], xytext=(0, -below), textcoords="offset points", **style)
            taken.append((x, y, wide))


def save_png(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG."""
    with mpl.rc_context(_STYLE), replacing(Path(path)) as file:
        figure.savefig(file, format="png", dpi=160)


def to_svg(figure: Figure, prefix: str) -> str:
    """A figure as an `<svg>` element for a page.

    Args:
        figure: what to draw.
        prefix: stands before every id, so that several figures can live on one page; also makes ids repeatable.

    Returns:
        The element: no namespace or document addresses, no size but the view box, colours as the CSS variables
        `--ink`, `--muted`, `--grid`, `--paper` and `--series-0` and so on.
    """
    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    start = svg.index("<svg")
    end = svg.index(">", start)
    head, body = svg[start:end], svg[end:]
    head = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", head)
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL).replace("xlink:href", "href")
    svg = head + body
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\1{prefix}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg


def _draw_row(axes: Axes, height: int, row: dict[str, Any], reference: float, edge: float | None) -> None:
    """One row: point, interval and label, or an arrow at the `edge` of the plot for a row that lies beyond it."""
    is_reference = row["verdict"] == "reference"
    decided = row["verdict"] in ("better", "worse")
    color = MUTED if is_reference or not decided else SERIES[0] if row["verdict"] == "better" else SERIES[1]
    if edge is not None:
        beyond = row["perplexity"] > reference
        axes.plot(edge, height, marker=">" if beyond else "<", color=color, markersize=7, clip_on=False, zorder=3)
        axes.annotate(
            "off the scale", (edge, height), xytext=(-8 if beyond else 8, 0), textcoords="offset points",
            ha="right" if beyond else "left", va="center", fontsize=9, color=MUTED,
        )  # fmt: skip
    else:
        if row["ci95"] is not None:
            ends = [_drawn(reference, nats) for nats in row["ci95"]]
            axes.plot(ends, [height, height], color=color, linewidth=2.4, solid_capstyle="butt", alpha=0.6, zorder=2)
        filled = color if decided or is_reference else PAPER
        axes.plot(row["perplexity"], height, "o", color=color, markerfacecolor=filled, markersize=6.5, zorder=3)
    label = row["shown"]
    if not is_reference:
        label += f"   {row['delta']:+.4f} nats".replace("-", "−")
    axes.annotate(label, (1.02, height), xycoords=("axes fraction", "data"), va="center", fontsize=9.5, color=INK)


def _drawn(reference: float, nats: float) -> float:
    """The perplexity that lies so many nats above a reference, as far as it can be drawn."""
    return min(reference * math.exp(min(nats, 100.0)), _LARGEST)


def _limits(rows: list[dict[str, Any]]) -> tuple[float, float, dict[str, float]]:
    """The axis' two ends, and of a row that lies far beyond all others the end it is drawn at."""
    reference = next(row for row in rows if row["verdict"] == "reference")["perplexity"]
    distances = sorted((abs(row["perplexity"] - reference), row["plan"]) for row in rows)
    beyond = None
    if len(rows) > 2 and distances[-1][0] > _OUTLIER * distances[-2][0] > 0:
        beyond = distances[-1][1]
    shown = [row for row in rows if row["plan"] != beyond]
    ends = [row["perplexity"] for row in shown]
    ends += [_drawn(reference, nats) for row in shown if row["ci95"] is not None for nats in row["ci95"]]
    margin = 0.06 * (max(ends) - min(ends)) or 0.01 * reference
    low, high = min(ends) - margin, max(ends) + margin
    if beyond is None:
        return low, high, {}
    outlier = next(row for row in rows if row["plan"] == beyond)
    return low, high, {beyond: high if outlier["perplexity"] > reference else low}


def _series(lines: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a quantity, where it was logged and finite."""
    logged = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    steps, values = np.array(logged, dtype=np.float64).reshape(-1, 2).T
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the values around each, over a twentieth of the whole on either side."""
    reach, at = len(values) // 20, np.arange(len(values))
    begin, end = np.maximum(0, at - reach), np.minimum(len(values), at + reach + 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[end] - sums[begin]) / (end - begin)
