"""`python -m benchmarks.kernels`: the fused operations on the CPU, against three ways of writing them in PyTorch."""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import block as blocks
from benchmarks import harness
from benchmarks.block import SHAPES, Block, Provider
from benchmarks.correctness import check
from benchmarks.harness import Budget, note, spread
from benchmarks.memory import peak_memory
from planlm.kernels import cpp
from planlm.report.tables import align

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class KernelRow(harness.Row):
    """One provider on one shape in one dtype; times of several processes are over the processes' medians."""

    shape: str
    status: str = "ok"  # or "out of memory", with which times are 0
    bytes: int  # of compulsory work, as `flops`
    flops_per_s: float  # of large matrix products on this machine
    bytes_per_s: float  # of large copies
    min: float = 0.0  # seconds of the fastest run
    process_memory: int | None = None  # bytes of the whole process, where `memory` is of torch's allocators
    processes: int = 1

    @property
    def key(self) -> tuple[Any, ...]:
        """What says that two rows measure the same."""
        return self.device, self.threads, self.malloc, self.shape, self.dtype, self.provider

    @property
    def case(self) -> str:
        """Shape, dtype and, where it is not the usual one, malloc."""
        return f"{self.shape} {self.dtype}" + ("" if self.malloc == "default" else f" malloc {self.malloc}")

    @property
    def lower_bound(self) -> float:
        """Seconds that the compulsory work takes, products and then bytes."""
        return self.flops / self.flops_per_s + self.bytes / self.bytes_per_s

    @property
    def roofline(self) -> float:
        """Share that is reached of the roofline, where the shorter of the two hides behind the longer."""
        return max(self.flops / self.flops_per_s, self.bytes / self.bytes_per_s) / self.median

    def over_bound(self) -> dict[str, float]:
        """p20, median and p80 over the lower bound."""
        return {name: getattr(self, name) / self.lower_bound for name in ("p20", "median", "p80")}


class Threshold(NamedTuple):
    """The largest ratio that passes, of one provider to another or to the lower bound, and the shapes it is for.

    `quantity` is "median", of the time round by round, or "memory".
    """

    quantity: str
    provider: str
    of: str
    limit: float
    shapes: tuple[str, ...]


_CPU_SHAPES = ("gpt2", "smollm2", "large-K")

THRESHOLDS = (
    Threshold("median", "planlm", "lower bound", 1.3, _CPU_SHAPES),
    Threshold("median", "planlm", "strong eager", 1.0, _CPU_SHAPES),
    Threshold("median", "planlm", "compiled", 1.0, _CPU_SHAPES),
    Threshold("median", "planlm", "token-level", 0.05, ("gpt2",)),
    Threshold("memory", "planlm", "strong eager", 0.25, ("large-K",)),
    Threshold("memory", "planlm", "token-level", 0.05, ("gpt2",)),
)


@harness.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 (a wrong result, a threshold missed), 2 (bad usage)."""
    parser = harness.parser_of("kernels", __doc__)
    harness.add_names(parser, "shapes", SHAPES)
    harness.add_flags(parser, blocks.PROVIDERS, Budget.repetitions)
    harness.add_number(parser, "seconds", Budget.seconds, 1e-9, "of repetitions of each provider, but three at least")
    harness.add_file(parser, "plot", "draw time over lower bound", suffixes=(".png", ".pdf", ".svg"))
    parser.add_argument("--compare", type=Path, metavar="FILE", help="compare with rows of an earlier commit")
    text = "keep: glibc's malloc keeps freed memory; both: two runs, one after the other"
    parser.add_argument("--malloc", choices=("default", "keep", "both"), default="default", help=text)
    harness.add_number(parser, "processes", 1, 1, "measure each case in so many, and take medians")
    parser.add_argument("--bars", action="store_true", help="judge by the thresholds; 1 is the status where one fails")
    options = parser.parse_args(arguments)
    rows = measure_all(options, harness.CPU)
    return harness.print_verdicts(judged(rows, THRESHOLDS)) if options.bars else 0


def measure_all(options: argparse.Namespace, device: torch.device) -> list[KernelRow]:
    """Measure what the flags ask for and show it; rows are written out after every case, for runs that are cut off.

    On the CPU every case has processes of its own: malloc cannot be told to go back, and what earlier cases left in the
    heap decides whether blocks of a later one are mapped afresh: large-K in bf16 took strong eager 293 ms alone and
    223 ms after others, PlanLM 232 and 224 ms.

    Raises:
        InputError: no rows to compare with, or no glibc to keep memory with.
        WrongResultError: a provider computes something else; nothing of that case has been timed.
    """
    budget = Budget(options.repetitions, options.seconds)
    earlier = harness.read_rows(options.compare, KernelRow) if options.compare else []
    cpu = device.type == "cpu"
    if "compiled" in options.providers and (reason := blocks.why_not_compiled(device)):
        note(f"left out: compiled ({reason})")
    if "planlm" in options.providers and cpu and (reason := cpp.why_not()):
        note(f"planlm runs its eager reference: {reason}")
    if (load := os.getloadavg()[0]) > 0.5:
        note(f"load average {load:.1f} at the start: times are good only where nothing else runs")
    rows: list[KernelRow] = []
    mallocs = ("default", "keep") if options.malloc == "both" else (options.malloc,)
    for number, *case in itertools.product(range(options.processes), mallocs, options.dtypes, options.shapes):
        note(f"process {number + 1} of {options.processes}, malloc {' '.join(case)}")
        arguments = (*case, options.providers, device, budget)
        rows += harness.in_new_process(measure, *arguments) if cpu else measure(*arguments)
        if options.out:
            harness.write_rows(options.out, pooled(rows))
    rows = pooled(rows)
    print(table(rows))
    if options.compare:
        print(f"\n{comparison(rows, earlier)}")
    if options.plot:
        draw(rows, options.plot)
        note(f"drew {options.plot}")
    return rows


def measure(
    malloc: str, dtype: str, shape: str, names: Sequence[str], device: torch.device, budget: Budget
) -> list[KernelRow]:
    """Correctness, then times, then memory of one case, from one set-up."""
    if malloc == "keep":
        harness.keep_memory()
    if device.type == "cpu":
        refuse_beyond_memory()
    rates = blocks.measure_rates(harness.DTYPES[dtype], device)
    note(f"matrix products at {rates.flops / 1e9:,.0f} GFLOP/s, copies at {rates.bytes / 1e9:,.1f} GB/s")
    block = blocks.setup(SHAPES[shape], harness.DTYPES[dtype], device)
    found = blocks.providers(names, device)
    note(f"checking {', '.join(found)} against float64")
    exhausted = check(block, found)
    runs = {name: _run(found[name], block) for name in found if name not in exhausted}
    note("timing")
    times = harness.interleaved(runs, device, budget)
    note(", ".join(f"{name} {1e3 * statistics.median(times[name]):,.1f} ms" for name in runs))
    case = {"shape": shape, "dtype": dtype, "malloc": malloc, **harness.provenance(device)}
    case |= vars(blocks.compulsory(SHAPES[shape], harness.DTYPES[dtype]))
    case |= {"flops_per_s": rates.flops, "bytes_per_s": rates.bytes}
    rows = []
    for name in found:
        measured = harness.UNMEASURED | {"status": "out of memory"}
        if name in runs:
            memory, process_memory = peak_memory(runs[name], device)
            measured = harness.timing(times, name) | {"memory": memory, "process_memory": process_memory}
            measured["min"] = min(times[name])
        rows.append(KernelRow(provider=name, **case, **measured))
    return rows


def _run(provider: Provider, block: Block) -> Callable[[], list[Tensor]]:
    """Forward and backward without arguments: the outputs, and the gradients but for those that are upstream itself."""

    def run() -> list[Tensor]:
        outputs, gradients = blocks.forward_backward(provider, block)
        given = {dy.untyped_storage().data_ptr() for dy in block.upstream}
        return [*outputs, *(tensor for tensor in gradients if tensor.untyped_storage().data_ptr() not in given)]

    return run


def refuse_beyond_memory() -> None:
    """Let an allocation beyond nine tenths of the free memory fail: Linux would grant it and kill the process later."""
    meminfo, status = Path("/proc/meminfo"), Path("/proc/self/status")
    if not meminfo.exists():
        return
    free, used = (
        1024 * int(line.split()[1])
        for path, field in ((meminfo, "MemAvailable:"), (status, "VmData:"))
        for line in path.read_text().splitlines()
        if line.startswith(field)
    )
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (used + free * 9 // 10, hard))


def pooled(rows: Sequence[KernelRow]) -> list[KernelRow]:
    """One row for those that measure the same in several processes: medians, and the spread of the processes' medians.

    Where memory lies decides about a process's speed for as long as it lives, so repetitions within one say little
    about the next. The ratios in `over` are of one round, so within a process, as before.
    """
    same: dict[tuple[Any, ...], list[KernelRow]] = {}
    for row in rows:
        same.setdefault(row.key, []).append(row)
    return [_pool(members) if len(members) > 1 else members[0] for members in same.values()]


def _pool(members: Sequence[KernelRow]) -> KernelRow:
    if failed := [row for row in members if row.status != "ok"]:
        return failed[0]
    others = [name for name in members[0].over if all(name in row.over for row in members)]
    values: dict[str, Any] = {
        **spread([row.median for row in members]),
        **{name: statistics.median(getattr(row, name) for row in members) for name in ("flops_per_s", "bytes_per_s")},
        **{name: max(getattr(row, name) or 0 for row in members) or None for name in ("memory", "process_memory")},
        "over": {name: spread([row.over[name]["median"] for row in members]) for name in others},
        "min": min(row.min for row in members),
        "repetitions": sum(row.repetitions for row in members),
        "processes": len(members),
    }
    return replace(members[0], **values)


HEADINGS = (
    "provider", "median ms", "p20", "p80", "min", "× bound", "roofline", "GB/s", "TFLOP/s", "memory MB", "process MB",
    "times",
)  # fmt: skip


def table(rows: Sequence[KernelRow]) -> str:
    """Every case under a line with its lower bound; one line a provider."""
    first = rows[0]
    lines = [
        f"{first.device}, {first.threads} threads, torch {first.torch}, planlm {first.planlm} on backend "
        f"{first.backend} ({first.commit or 'no commit'}), {first.date[:10]}",
        "Forward and backward of a block. GB/s and TFLOP/s count compulsory work only; memory is what is needed beyond",
        "inputs and results, by torch's allocators and by the whole process.",
    ]
    for case, group in groupby(rows, key=lambda row: row.case):
        members = list(group)
        row = members[0]
        products = f"{row.flops / 1e9:.2f} GFLOP at {row.flops_per_s / 1e12:.3g} TFLOP/s"
        moved = f"{row.bytes / 1e6:.0f} MB at {row.bytes_per_s / 1e9:.3g} GB/s"
        lines += ["", f"{case}: lower bound {1e3 * row.lower_bound:.2f} ms = {products} + {moved}"]
        lines += [align([HEADINGS, *map(_cells, members)], left=(0,))]
    return "\n".join(lines)


def _cells(row: KernelRow) -> list[str]:
    if row.status != "ok":
        return [row.provider, row.status, *("" for _ in HEADINGS[2:])]
    return [
        row.provider,
        *(f"{1e3 * seconds:.2f}" for seconds in (row.median, row.p20, row.p80, row.min)),
        f"{row.over_bound()['median']:.2f}",
        f"{100 * row.roofline:.1f} %",
        f"{row.bytes / row.median / 1e9:.4g}",
        f"{row.flops / row.median / 1e12:.3g}",
        *("–" if size is None else f"{size / 1e6:,.1f}" for size in (row.memory, row.process_memory)),
        str(row.repetitions),
    ]


def comparison(rows: Sequence[KernelRow], earlier: Sequence[KernelRow]) -> str:
    """New over old median of every row that both have, flagged where the ranges p20 to p80 do not overlap."""
    old = {row.key: row for row in earlier if row.status == "ok"}
    lines = ["New over old median; a change counts where the ranges from p20 to p80 do not overlap.", ""]
    for row in rows:
        before = old.get(row.key)
        if row.status != "ok" or before is None:
            continue
        change = "faster" if row.p80 < before.p20 else "SLOWER" if row.p20 > before.p80 else "same"
        lines.append(
            f"{row.case:<32}  {row.provider:<12}  {row.median / before.median:6.3f}  {change:<6}  "
            f"{1e3 * before.median:.2f} → {1e3 * row.median:.2f} ms  ({before.commit} → {row.commit})"
        )
    return "\n".join(lines) if len(lines) > 2 else "Nothing to compare: no earlier row measures the same."


def judged(rows: Sequence[KernelRow], thresholds: Sequence[Threshold]) -> Iterator[tuple[bool, str]]:
    """Every threshold on every case that has its rows: whether it passes, and a line that says so."""
    for case, members in groupby(rows, key=lambda row: row.case):
        by_name = {row.provider: row for row in members if row.status == "ok"}
        for quantity, provider, of, limit, shapes in thresholds:
            ours = by_name.get(provider)
            theirs = ours if of == "lower bound" else by_name.get(of)
            if ours is None or theirs is None or ours.shape not in shapes:
                continue
            if quantity == "memory":
                value, between = (ours.memory or 0) / (theirs.memory or 1), ""
            else:
                over = ours.over_bound() if of == "lower bound" else ours.over[of]
                value, between = over["median"], f" [{over['p20']:.3g}, {over['p80']:.3g}]"
            yield harness.verdict(value <= limit, f"{case}: {quantity} {value:.3g}{between} × {of}, at most {limit:g}")


def draw(rows: Sequence[KernelRow], path: Path) -> None:
    """A bar chart of time over lower bound: a panel for each dtype and malloc, a group for each shape."""
    from matplotlib.figure import Figure

    from planlm.report.plots import MUTED, PAPER, SERIES

    rows = [row for row in rows if row.status == "ok"]
    panels: dict[str, list[KernelRow]] = {}
    for row in rows:
        panels.setdefault(f"{row.dtype}, malloc {row.malloc}", []).append(row)
    palette = zip(blocks.PROVIDERS, (SERIES[1], SERIES[4], SERIES[2], SERIES[0]), strict=True)
    colors = {name: color for name, color in palette if any(row.provider == name for row in rows)}
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 5.0 * columns, 0.9 + 2.9 * lines), facecolor=PAPER, layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
    for axes, (title, members) in zip(grid, panels.items(), strict=False):
        _draw_panel(axes, members, colors)
        axes.set_title(title, loc="left")
    lowest, highest = min(row.over_bound()["p20"] for row in rows), max(row.over_bound()["p80"] for row in rows)
    grid[0].set_ylim(min(0.8, 0.9 * lowest), 1.5 * highest)  # room for the numbers; the panels share it
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(colors), frameon=False)
    figure.supylabel("time / lower bound", fontsize=10, color=MUTED)
    text = f"{rows[0].device}, {rows[0].threads} threads; median with p20 to p80; lower is better, 1 is the bound"
    figure.supxlabel(text, fontsize=8.5, color=MUTED)
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Axes, rows: Sequence[KernelRow], colors: Mapping[str, str]) -> None:
    """Bars on a logarithmic axis, each with its number."""
    from planlm.report.plots import GRID, INK, MUTED

    shapes = list(dict.fromkeys(row.shape for row in rows))
    width = 0.8 / len(colors)
    for number, (name, color) in enumerate(colors.items()):
        own = [row for row in rows if row.provider == name]
        positions = [shapes.index(row.shape) + (number - (len(colors) - 1) / 2) * width for row in own]
        low, height, high = torch.tensor([list(row.over_bound().values()) for row in own]).view(-1, 3).T.numpy()
        style = {"ecolor": INK, "elinewidth": 0.9, "capsize": 1.5}
        error = [height - low, high - height]
        bars = axes.bar(positions, height, 0.92 * width, color=color, label=name, yerr=error, error_kw=style, zorder=2)
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7, color=INK)
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
    axes.set_facecolor("none")
    axes.tick_params(length=0, which="both", labelcolor=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
