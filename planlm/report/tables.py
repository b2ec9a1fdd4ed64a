"""Results as text: aligned tables for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
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


def format_planner(planner: dict[str, Any]) -> str:
    """The planner's metrics, one a line."""
    title = f"Planner: next action of {planner['num_actions']:,}, over {_count(planner['sentences'], 'sentence')}"
    cells = [(label, f"{planner[key]:.4f}") for key, label in PLANNER_METRICS if key in planner]
    return f"{title}\n\n{align(cells, left=(0,))}"


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
