"""Results: JSON lines, a table, a bar chart, comparison with earlier ones, and the bars that they have to pass.

A row is one provider on one shape in one dtype. Its keys: shape, dtype, provider, malloc, status ("ok" or "out of
memory"); flops, bytes (compulsory), flops_per_s, bytes_per_s (measured), floor; repetitions, processes; median, p20,
p80, min (seconds; of several processes the first three are over the processes' medians); ratio (median to floor),
roofline (share of it that is reached), gb_per_s, tflop_per_s (compulsory work over median); over (by other provider:
median, p20, p80 of the time over its time in the same round); memory, process_memory (bytes at the peak beyond inputs
and results); device, driver, threads, torch, triton, planlm, backend (PlanLM's), commit, date.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.blocks import PROVIDERS
from planlm.errors import InputError
from planlm.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
"""One result, ready for JSON."""


KEY = ("device", "threads", "malloc", "shape", "dtype", "provider")
"""What says that two rows measure the same."""

HEADINGS = (
    "provider", "median ms", "p20", "p80", "min", "× floor", "roofline", "GB/s", "TFLOP/s", "memory MB", "process MB",
    "times",
)  # fmt: skip


class Bar(NamedTuple):
    """A limit: a quantity of one provider over that of another, or over the floor.

    Attributes:
        quantity: "median", of the time round by round, or "memory".
        provider: whose quantity.
        of: the provider compared with, or "floor".
        limit: the largest ratio that passes.
        shapes: where it holds.
    """

    quantity: str
    provider: str
    of: str
    limit: float
    shapes: tuple[str, ...]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write JSON lines, the whole file at once."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """Rows that `write_rows` wrote.

    Raises:
        InputError: no such file, no JSON lines in it, or lines of something else.
    """
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected rows that --out wrote ({error})") from None
    for number, row in enumerate(rows, 1):
        given = row if isinstance(row, dict) else {}
        needed = {*KEY, "status", *(("median", "p20", "p80", "commit") if given.get("status") == "ok" else ())}
        if not needed <= given.keys():
            raise InputError(f"{path}: row {number} is none that --out wrote; it needs {', '.join(sorted(needed))}")
    return rows


def pooled(rows: Sequence[Row]) -> list[Row]:
    """One row for those that measure the same in several processes: medians, and the spread of the processes' medians.

    Where memory lies decides about a process's speed for as long as it lives, so repetitions within one say little
    about the next. The share of a round that `over` compares is within a process as before.
    """
    same: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        same.setdefault(_key(row), []).append(row)
    return [_pool(members) if len(members) > 1 else members[0] for members in same.values()]


def _pool(members: Sequence[Row]) -> Row:
    failed = [row for row in members if row["status"] != "ok"]
    if failed:
        return failed[0]
    typical = {
        name: statistics.median(row[name] for row in members) for name in ("flops_per_s", "bytes_per_s", "floor")
    }
    time = spread([row["median"] for row in members])
    others = [name for name in members[0]["over"] if all(name in row["over"] for row in members)]
    first, median = members[0], time["median"]
    roofline = max(first["flops"] / typical["flops_per_s"], first["bytes"] / typical["bytes_per_s"])
    return (
        first
        | typical
        | time
        | {"ratio": median / typical["floor"], "roofline": roofline / median}
        | {"gb_per_s": first["bytes"] / median / 1e9, "tflop_per_s": first["flops"] / median / 1e12}
        | {"over": {name: spread([row["over"][name]["median"] for row in members]) for name in others}}
        | {"min": min(row["min"] for row in members), "processes": len(members)}
        | {"repetitions": sum(row["repetitions"] for row in members)}
        | {name: max(row[name] or 0 for row in members) or None for name in ("memory", "process_memory")}
    )


def spread(values: Sequence[float]) -> Row:
    """p20, median and p80."""
    return dict(zip(("p20", "median", "p80"), quantiles(values), strict=True))


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20 %, median, 80 %."""
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return p20, statistics.median(values), p80


def table(rows: Sequence[Row]) -> str:
    """Every case under a line with its floor; one line a provider."""
    first = rows[0]
    lines = [
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}, planlm {first['planlm']} on backend "
        f"{first['backend']} ({first['commit'] or 'no commit'}), {first['date'][:10]}",
        "Forward and backward of a block. GB/s and TFLOP/s count compulsory work only; memory is what is needed beyond",
        "inputs and results, by torch's allocators and by the whole process.",
    ]
    cases = [(case, list(members)) for case, members in groupby(rows, key=_case)]
    cells = [_cells(row) for row in rows if row["status"] == "ok"]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *cells, strict=True)]
    for case, members in cases:
        row = members[0]
        products = f"{row['flops'] / 1e9:.2f} GFLOP at {row['flops_per_s'] / 1e12:.3g} TFLOP/s"
        moved = f"{row['bytes'] / 1e6:.0f} MB at {row['bytes_per_s'] / 1e9:.3g} GB/s"
        lines += ["", f"{case}: floor {1e3 * row['floor']:.2f} ms = {products} + {moved}", _line(HEADINGS, widths)]
        for row in members:
            ok = row["status"] == "ok"
            lines.append(_line(_cells(row), widths) if ok else f"{row['provider']:<{widths[0]}}  {row['status']}")
    return "\n".join(lines)


def comparison(rows: Sequence[Row], earlier: Sequence[Row]) -> str:
    """New over old median of every row that both have, flagged where the ranges p20 to p80 do not overlap."""
    old = {_key(row): row for row in earlier if row["status"] == "ok"}
    lines = ["New over old median; a change counts where the ranges from p20 to p80 do not overlap.", ""]
    for row in rows:
        before = old.get(_key(row))
        if row["status"] != "ok" or before is None:
            continue
        verdict = "faster" if row["p80"] < before["p20"] else "SLOWER" if row["p20"] > before["p80"] else "same"
        lines.append(
            f"{_case(row):<32}  {row['provider']:<12}  {row['median'] / before['median']:6.3f}  {verdict:<6}  "
            f"{1e3 * before['median']:.2f} → {1e3 * row['median']:.2f} ms  ({before['commit']} → {row['commit']})"
        )
    return "\n".join(lines) if len(lines) > 2 else "Nothing to compare: no earlier row measures the same."


def judged(rows: Sequence[Row], bars: Sequence[Bar]) -> Iterator[tuple[bool, str]]:
    """Every bar on every case that has its rows: whether it passes, and a line that says so."""
    for _, members in groupby(rows, key=_case):
        case = {row["provider"]: row for row in members}
        for bar in bars:
            ours = case.get(bar.provider)
            if ours is None or ours["shape"] not in bar.shapes or ours["status"] != "ok":
                continue
            theirs = ours if bar.of == "floor" else case.get(bar.of)
            if theirs is None or theirs["status"] != "ok":
                continue
            if bar.quantity == "median":
                over = _over_floor(ours) if bar.of == "floor" else ours["over"][bar.of]
                value, spread = over["median"], f" [{over['p20']:.3g}, {over['p80']:.3g}]"
            else:
                value, spread = ours[bar.quantity] / theirs[bar.quantity], ""
            measured = f"{bar.quantity} {value:.3g}{spread} × {bar.of}"
            passed = value <= bar.limit
            yield passed, f"{'PASS' if passed else 'FAIL'}  {_case(ours)}: {measured}, at most {bar.limit:g}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """A bar chart of time over floor: a panel for each dtype and malloc, a group for each shape."""
    from matplotlib.figure import Figure

    from planlm.report.plots import MUTED, PAPER, SERIES

    rows = [row for row in rows if row["status"] == "ok"]
    panels = list(dict.fromkeys((row["malloc"], row["dtype"]) for row in rows))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    palette = zip(PROVIDERS, (SERIES[1], SERIES[4], SERIES[2], SERIES[0]), strict=True)
    colors = {name: color for name, color in palette if any(row["provider"] == name for row in rows)}
    columns = min(2, len(panels))
    num_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 5.0 * columns, 0.9 + 2.9 * num_rows), facecolor=PAPER, layout="constrained")
    grid = figure.subplots(num_rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (malloc, dtype) in zip(grid.flat, panels, strict=False):
        members = [row for row in rows if (row["malloc"], row["dtype"]) == (malloc, dtype)]
        _draw_panel(axes, members, shapes, colors)
        axes.set_title(f"{dtype}, malloc {malloc}" if len({panel[0] for panel in panels}) > 1 else dtype, loc="left")
        if axes in grid[:, 0]:
            axes.set_ylabel("time / floor", color=MUTED)
    lowest, highest = (pick(row[end] / row["floor"] for row in rows) for pick, end in ((min, "p20"), (max, "p80")))
    grid.flat[0].set_ylim(min(0.8, 0.9 * lowest), 1.5 * highest)  # room for the numbers; the panels share it
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(colors), frameon=False)
    device = f"{rows[0]['device']}, {rows[0]['threads']} threads"
    figure.supxlabel(f"{device}; median with p20 to p80, lower is better, 1 is the floor", fontsize=8.5, color=MUTED)
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Axes, rows: Sequence[Row], shapes: Sequence[str], colors: dict[str, str]) -> None:
    """Bars from 1, the floor, on a logarithmic axis, each with its number."""
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullFormatter

    from planlm.report.plots import GRID, INK, MUTED

    width = 0.8 / len(colors)
    for number, (name, color) in enumerate(colors.items()):
        own = {row["shape"]: row for row in rows if row["provider"] == name}
        places = [shapes.index(shape) + (number - (len(colors) - 1) / 2) * width for shape in own]
        heights = [row["ratio"] for row in own.values()]
        spread = [[row["ratio"] - row["p20"] / row["floor"] for row in own.values()]]
        spread += [[row["p80"] / row["floor"] - row["ratio"] for row in own.values()]]
        style = {"ecolor": INK, "elinewidth": 0.9, "capsize": 1.5}
        axes.bar(places, heights, 0.92 * width, color=color, label=name, yerr=spread, error_kw=style, zorder=2)
        for place, height, row in zip(places, heights, own.values(), strict=True):
            text = f"{height:.0f}" if height >= 10 else f"{height:.2f}" if height < 2 else f"{height:.1f}"
            top = max(row["p80"] / row["floor"], height)
            axes.annotate(text, (place, top), (0, 2), textcoords="offset points", ha="center", fontsize=7, color=INK)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
    axes.set_facecolor("none")
    axes.tick_params(length=0, which="both", labelcolor=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _over_floor(row: Row) -> Row:
    return {name: row[name] / row["floor"] for name in ("p20", "median", "p80")}


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _case(row: Row) -> str:
    """Shape, dtype and, where it is not the usual one, malloc."""
    return f"{row['shape']} {row['dtype']}" + ("" if row["malloc"] == "default" else f" malloc {row['malloc']}")


def _cells(row: Row) -> list[str]:
    times = [f"{1e3 * row[name]:.2f}" for name in ("median", "p20", "p80", "min")]
    return [
        row["provider"],
        *times,
        f"{row['ratio']:.2f}",
        f"{100 * row['roofline']:.1f} %",
        f"{row['gb_per_s']:.4g}",
        f"{row['tflop_per_s']:.3g}",
        *("–" if row[name] is None else f"{row[name] / 1e6:,.1f}" for name in ("memory", "process_memory")),
        str(row["repetitions"]),
    ]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *figures = zip(cells, widths, strict=True)
    return "  ".join([name[0].ljust(name[1]), *(cell.rjust(width) for cell, width in figures)]).rstrip()
