"""Results of an experiment as text and plots; nothing here reads anything else."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from planlm.errors import InputError
from planlm.evaluation.significance import NO_DIFFERENCE
from planlm.terminal import note

MINUS = "−"

MOST_LINES = 7
"""Rows that a figure shows a line of each: there are no more colours that can be told apart."""

PLOTS = ("rows", "where", "forgetting")
"""Plots of each LM, beside its curves."""


def tables(results: dict[str, Any]) -> str:
    """Tables in Markdown: for each LM the rows, the comparisons, what was chosen and what it cost."""
    parts = [f"# {' '.join(results['title'].split())}"]
    if results["missing"]:
        count = len(results["missing"])
        named = "; ".join(results["missing"][:20]) + (" ..." if count > 20 else "")
        parts.append(f"Missing so far, {count} cell{'s' if count > 1 else ''}: {named}.")
    for name, backbone in results["backbones"].items():
        parts += [f"## {name}", *_backbone(backbone, results["versus"])]
    return "\n\n".join(parts) + "\n"


def _backbone(backbone: dict[str, Any], versus: str) -> Iterator[str]:
    rows = backbone["rows"]
    if not rows:
        yield "No cell is finished yet."
        return
    first = next(iter(rows.values()))
    yield (
        f"NLL in nats per token on the {first['split']} split: {first['documents']:,} documents, {first['tokens']:,} "
        f"tokens, window {first['window']}, stride {first['stride']}. Differences are against {versus}, with 95 % "
        "intervals: the first a paired bootstrap over documents of scores averaged over seeds, the second a paired "
        "t interval over seeds of mean differences."
    )
    yield _table(
        (
            "trained",
            "evaluated",
            "perplexity",
            "NLL",
            "sd over seeds",
            "difference",
            "over documents",
            "over seeds",
            "p",
            "seeds",
        ),
        [_plan_cells(row, plan, found) for row in rows.values() for plan, found in row["plans"].items()],
    )
    if backbone["compare"]:
        yield "Comparisons; `lower` counts the seeds on which the first is lower:"
        yield _table(
            ("row", "against", "difference", "over documents", "over seeds", "p", "lower"),
            [_comparison_cells(each) for each in backbone["compare"]],
        )
    chosen = [(row["label"], row["chosen"]) for row in rows.values() if row["chosen"]]
    if chosen:
        yield "Chosen on validation, before test was read:"
        yield _table(("row", "chosen", "mean NLL on validation"), [_chosen_cells(*each) for each in chosen])
    forgotten = [(row["label"], row["forgetting"]) for row in rows.values() if row["forgetting"]]
    if forgotten:
        yield "The LM with the plan off, before and after training: NLL on another corpus, and on this one:"
        yield _table(
            ("row", "corpus", "before", "after", "difference", "here before", "here after", "difference"),
            [_forgetting_cells(*each) for each in forgotten],
        )
    device = next((row["device"] for row in rows.values() if row["device"]), None)
    yield f"Cost of training, means over seeds{f', on {device}' if device else ''}:"
    yield _table(
        ("row", "tokens", "seconds", "tokens/s", "peak memory", "parameters added"),
        [_cost_cells(row) for row in rows.values() if not row["model_of"]],
    )
    for row in rows.values():
        if row["own_budget"]:
            yield f"{row['label']} has a budget of its own: {row['own_budget']}."


def _plan_cells(row: dict[str, Any], plan: str, found: dict[str, Any]) -> list[str]:
    versus = found["versus"] or {}
    return [
        row["label"], plan, f"{found['perplexity']:.2f}", f"{found['nll']:.4f}", _number(found["nll_sd"], "{:.4f}"),
        *(["reference", "–", "–", "–"] if found["is_reference"] else _difference_cells(versus)),
        str(len(found["by_seed"])),
    ]  # fmt: skip


def _difference_cells(found: dict[str, Any]) -> list[str]:
    if "problem" in found:
        return [found["problem"], "–", "–", "–"]
    if not found:
        return ["–"] * 4
    return [
        _number(found["delta"], "{:+.4f}"), _interval(found["ci95"]), _interval(found["seeds_ci95"]),
        _number(found["p"], "{:.2g}"),
    ]  # fmt: skip


def _comparison_cells(found: dict[str, Any]) -> list[str]:
    lower = f"{found['lower']} of {found['seeds']}" if "lower" in found else "–"
    return [found["row"], found["versus"], *_difference_cells(found), lower]


def _chosen_cells(label: str, chosen: dict[str, Any]) -> list[str]:
    def named(values: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in values.items())

    tried = "; ".join(f"{named(each['values'])}: {each['nll']:.4f}" for each in chosen["validation"])
    return [label, named(chosen["values"]), tried]


def _forgetting_cells(label: str, found: dict[str, Any]) -> list[str]:
    def cells(scores: dict[str, Any]) -> list[str]:
        return [f"{scores['before']:.4f}", f"{scores['after']:.4f}", _number(scores["delta"], "{:+.4f}")]

    return [label, found["corpus"], *cells(found), *cells(found["trained_on"])]


def _cost_cells(row: dict[str, Any]) -> list[str]:
    cost = row["cost"]
    memory = None if cost["memory"] is None else cost["memory"] / 1e9
    return [
        row["label"], _number(cost["tokens"], "{:,.0f}"), _number(cost["seconds"], "{:,.0f}"),
        _number(cost["tokens_per_second"], "{:,.0f}"), _number(memory, "{:.2f} GB"),
        _number(cost["parameters_added"], "{:,.0f}"),
    ]  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value).replace("-", MINUS)


def _interval(ends: Sequence[float] | None) -> str:
    return "–" if ends is None else "[{:+.4f}, {:+.4f}]".format(*ends).replace("-", MINUS)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write_plots(results: dict[str, Any], out: Path) -> None:
    """Plots of each LM, of its rows and its curves; without matplotlib a line says that there are none."""
    try:
        from planlm.report.plots import breakdown_figure, lines_figure, perplexity_figure, save_png, trade_figure
    except InputError as error:
        note(f"no plots: {error}")
        return
    for name, backbone in results["backbones"].items():
        if (table := _figure_rows(backbone)) is not None:
            save_png(perplexity_figure(table), out / plot_name(name, "rows"))
            parts = {key: backbone[key] for key in ("by_position", "by_length") if key in backbone}
            there = {row["plan"] for bucket in parts.get("by_position", [])[:1] for row in bucket["rows"]}
            rows = [row for row in table["rows"] if row["plan"] in there & {*_compared(backbone), table["versus"]}]
            if (figure := breakdown_figure({**table, **parts, "rows": rows})) is not None:
                save_png(figure, out / plot_name(name, "where"))
        for curve_name, curve in backbone["curves"].items():
            if any(curve["lines"].values()):
                versus = f"nats per token against {curve['versus']}"
                figure = lines_figure(curve["lines"], x=curve["x"], y=versus, title=f"{name}: {curve_name}")
                save_png(figure, out / plot_name(name, curve_name))
        if len(forgotten := [row for row in backbone["rows"].values() if row["forgetting"]]) > 1:
            x = f"rise of the NLL on {forgotten[0]['forgetting']['corpus']} with the plan off, nats per token"
            title = f"{name}: what is learnt here against what is forgotten there"
            figure = trade_figure(_trade(backbone["rows"]), x=x, y="NLL here, nats per token", title=title)
            save_png(figure, out / plot_name(name, "forgetting"))


def _trade(rows: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows whose forgetting was measured, as `trade_figure` takes them; those of a sweep are one line."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, row in rows.items():
        if row["forgetting"]:
            value = name.partition("=")[2]
            nll = next(iter(row["plans"].values()))["nll"]
            point = {"x": row["forgetting"]["delta"], "y": nll, "label": value}
            lines.setdefault(row["label"].removesuffix(f" {value}"), []).append(point)
    return lines


def _compared(backbone: dict[str, Any]) -> list[str]:
    """Rows whose gain is drawn by sentence and length: the first of those compared, or of all, but the reference."""
    rows = backbone["rows"]
    sides = [side for each in backbone["compare"] for side in (each["row"], each["versus"])] or list(rows)
    labels = []
    for side in sides:
        row, _, plan = side.partition("/")
        plan = plan or next(iter(rows[row]["plans"])) if row in rows else ""
        if row in rows and not rows[row]["plans"].get(plan, {}).get("is_reference"):
            labels.append(_label(rows[row], plan))
    return list(dict.fromkeys(labels))[:MOST_LINES]


def _label(row: dict[str, Any], plan: str) -> str:
    return row["label"] if len(row["plans"]) == 1 else f"{row['label']} / {plan}"


def _figure_rows(backbone: dict[str, Any]) -> dict[str, Any] | None:
    """Rows as `perplexity_figure` takes them, their intervals over seeds where there are several."""
    rows = []
    for row in backbone["rows"].values():
        for plan, found in row["plans"].items():
            compared = found["versus"]
            if compared is None or "problem" in compared:
                continue
            interval = compared["seeds_ci95"] or compared["ci95"]
            if found["is_reference"]:
                interval, verdict = None, "reference"
            elif interval is None or interval[0] <= 0 <= interval[1]:
                verdict = NO_DIFFERENCE
            else:
                verdict = "better" if compared["delta"] < 0 else "worse"
            rows.append(
                {
                    "plan": figure_name(row["label"], row["plans"], plan),
                    "perplexity": found["perplexity"],
                    "delta": compared["delta"],
                    "ci95": interval,
                    "verdict": verdict,
                }
            )
    reference = next((row["plan"] for row in rows if row["verdict"] == "reference"), None)
    split = next((row["split"] for row in backbone["rows"].values()), "")
    return {"rows": rows, "versus": reference, "split": split} if reference and len(rows) > 1 else None


def figure_name(label: str, plans: Collection[str], plan: str) -> str:
    """What a row under one of its plans is called in figures."""
    return label if len(plans) == 1 else f"{label} / {plan}"


def plot_name(backbone: str, what: str) -> str:
    """The file of an LM's plot."""
    return "-".join(re.sub(r"[^\w.=-]+", "-", name) for name in (backbone, what)) + ".png"
