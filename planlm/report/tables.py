"""Results as text: aligned tables for a terminal of 80 columns."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

PLANNER_METRICS = (
    ("accuracy@1", "accuracy@1"),
    ("accuracy@5", "accuracy@5"),
    ("accuracy@10", "accuracy@10"),
    ("mrr", "mean reciprocal rank"),
    ("nll", "NLL (nats)"),
    ("ece", "calibration error"),
    ("unigram_nll", "unigram NLL (nats)"),
    ("unigram_accuracy@1", "accuracy of the most frequent action"),
    ("repeat_last_accuracy", "accuracy of repeating the last action"),
)
"""Keys of the planner's metrics with what they are called in front of readers."""

ROW_HEADINGS = ("plan", "perplexity", "difference", "95 % interval", "verdict")

FORGETTING_HEADINGS = ("text", "before", "after", "difference", "95 % interval", "documents")

SHORT = {"no measurable difference": "not measurable", "no interval: fewer than 6 documents": "few documents"}
"""Verdicts that are too long for a column."""


def describe(result: dict[str, Any]) -> str:
    """What a table of perplexities shows: split, size, window, reference; two sentences, a line each."""
    return (
        f"Perplexity on the {result['split']} split: {_count(result['documents'], 'document')}, "
        f"{_count(result['tokens'], 'token')}, window {result['window']}, stride {result['stride']}.\n"
        f"Differences: nats per token against {result['versus']}, with paired 95 % intervals over documents."
    )


def row_cells(row: dict[str, Any]) -> list[str]:
    """The cells of one row: plan, perplexity, difference, interval, verdict."""
    return [row["plan"], perplexity(row), *difference_cells(row)]


def difference_cells(row: dict[str, Any]) -> list[str]:
    """What a row shows of its difference to another: nats, interval, verdict."""
    interval = row["ci95"]
    return [
        "0" if row["verdict"] == "reference" else f"{row['delta']:+.4f}".replace("-", "−"),
        "–" if interval is None else "[{:+.4f}, {:+.4f}]".format(*interval).replace("-", "−"),
        SHORT.get(row["verdict"], row["verdict"]),
    ]


def perplexity(row: dict[str, Any]) -> str:
    """A row's perplexity; that of a diverged model has up to 300 digits."""
    return f"{row['perplexity']:.2f}" if row["perplexity"] < 1e7 else f"{row['perplexity']:.2e}"


def format_rows(result: dict[str, Any]) -> str:
    """The table of perplexities, below what it shows.

    Args:
        result: `split`, `window`, `stride`, `tokens`, `documents`, `versus` and `rows` as `compare_rows` makes them.
    """
    about = "\n".join(textwrap.fill(line, 80) for line in describe(result).splitlines())
    return f"{about}\n\n{align([ROW_HEADINGS, *map(row_cells, result['rows'])], left=(0, 4))}"


def format_breakdown(result: dict[str, Any]) -> str:
    """Differences to the reference by sentence and by length of the document, as many plans as 80 columns hold.

    Those of which no interval leaves zero out stand in brackets. Empty for results that have no such parts.
    """
    parts = []
    for key, heading in (("by_position", "sentence"), ("by_length", "document")):
        if not result.get(key):
            continue
        rows = [
            [heading, "tokens", *(row["plan"] for row in result[key][0]["rows"] if row["plan"] != result["versus"])]
        ]
        for part in result[key]:
            cells = [_bracketed(row) for row in part["rows"] if row["plan"] != result["versus"]]
            rows.append([part["bucket"], f"{part['rows'][0]['tokens']:,}", *cells])
        widths = [2 + max(map(len, column)) for column in zip(*rows, strict=True)]
        shown = sum(total <= 82 for total in itertools.accumulate(widths))
        parts.append(align([row[:shown] for row in rows], left=(0,)))
    about = (
        f"Nats per token against {result['versus']}, by number of the sentence and by tokens of the document; in "
        "brackets where no interval leaves zero out."
    )
    return "\n\n".join([textwrap.fill(about, 80), *parts]) if parts else ""


def _bracketed(row: dict[str, Any]) -> str:
    difference, _, verdict = difference_cells(row)
    return difference if verdict in ("better", "worse") else f"({difference})"


def format_cost(cost: dict[str, Any]) -> str:
    """Parameters and time of planning, in a sentence each."""
    sizes = ", ".join(f"{name} {size:,}" for name, size in cost["parameters"].items())
    seconds = cost["seconds_per_1000_tokens"]
    chosen = [plan for plan in ("none", cost["selection"]) if plan in seconds] or list(seconds)
    times = ", ".join(f"{plan} {seconds[plan]:.3f}" for plan in dict.fromkeys(chosen))
    return textwrap.fill(f"Parameters: {sizes}. Seconds per 1,000 tokens of a process: {times}.", 80)


def format_planner(planner: dict[str, Any]) -> str:
    """The planner's metrics, one a line."""
    title = f"Planner: next action of {planner['num_actions']:,}, over {_count(planner['sentences'], 'sentence')}"
    cells = [(label, f"{planner[key]:.4f}") for key, label in PLANNER_METRICS if key in planner]
    for step, ahead in enumerate(planner.get("ahead", []), 2):
        cells += [
            (f"{label}, {step} sentences ahead", f"{ahead[key]:.4f}") for key, label in PLANNER_METRICS if key in ahead
        ]
    return f"{title}\n\n{align(cells, left=(0,))}"


def format_forgetting(found: dict[str, Any]) -> str:
    """What training has cost the LM with the plan off, as `planlm.evaluation.forgetting` measures it."""
    title = (
        "Forgetting: the LM's perplexity with the plan off, before training and after.\nDifferences: nats per token."
    )
    return f"{title}\n\n{align([FORGETTING_HEADINGS, *forgetting_cells(found)], left=(0,))}"


def forgetting_cells(found: dict[str, Any]) -> Iterator[list[str]]:
    """A row for the other corpus and one for the corpus that was trained on."""
    for name, row in (
        (f"{found['corpus']}, {found['split']}", found),
        ("of the corpus trained on", found["trained_on"]),
    ):
        before, after = (perplexity({"perplexity": math.exp(min(row[key], 700.0))}) for key in ("before", "after"))
        difference, interval, _ = difference_cells({**row, "verdict": ""})
        yield [name, before, after, difference, interval, f"{row['documents']:,}"]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def align(rows: Sequence[Sequence[str]], left: tuple[int, ...]) -> str:
    """Columns padded to their widest cell; `left` lists the columns of words, the others hold numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def number(value: float | None, places: int, sign: str = "") -> str:
    """A figure with so many decimals, with `sign="+"` always with its sign; a dash for none."""
    return "–" if value is None else f"{value:{sign}.{places}f}".replace("-", "−")


def ends(interval: Sequence[float] | None, places: int, sign: str = "") -> str:
    """An interval as `number` shows its ends."""
    return "–" if interval is None else f"[{', '.join(number(end, places, sign) for end in interval)}]"
