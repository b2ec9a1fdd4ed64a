"""What a run would take, as text for a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from planlm.report.tables import align

BASIS = (
    "Predicted, not measured: each GPU takes a batch as large as the one here, so that N of them take N times "
    "--batch-size in fewer steps, over as many tokens. FLOPs, bytes, launches and weights are counted; the GPUs' "
    "rates, the shares of them that a step reaches, links and disk are assumed (docs/budget.md)."
)

UNKNOWN = "unknown"
"""What planning adds, where of some phase no more than one step was measured: steps differ by more than it may."""


def format_budget(result: dict[str, Any]) -> str:
    """A table of what was measured here, where the time goes, and a table of GPUs.

    Args:
        result: as `planlm.training.budget.plan_budget` returns it.
    """
    joint, plain = result["joint"], result["plain"]
    title = (
        f"{result['steps']:,} steps of {result['batch_size']:,} sequences of {result['window']:,} tokens, "
        f"selection {result['selection']}. Measured here ({result['device']}), and extrapolated to the run:"
    )
    parts = [f"{textwrap.fill(title, 80)}\n{align(list(_here(joint, plain, result['compared_with'])), left=(0, 4))}"]
    times = [("where the time goes", "", "")]
    for name, seconds in joint["parts"].items():
        times.append((name, _time(seconds), ""))
    for phase in joint["phases"]:
        at = next(number for number, row in enumerate(times) if row[0] == f"steps from {phase['from']:,} on")
        times[at] = (*times[at][:2], _step(phase))
    parts.append(align(times, left=(0, 2)))
    parts.append(f"{textwrap.fill(BASIS, 80)}\n\n{align(list(_gpus(result['gpus'])), left=(0, 7))}")
    return "\n\n".join(parts)


def _here(joint: dict[str, Any], plain: dict[str, Any] | None, other: str | None) -> Iterator[Sequence[str]]:
    """Rows of what was measured: with the plan and, where there is such a run, without."""
    found = [joint, *([plain] if plain else [])]
    without = "without it" if other == "none" else f"plan {other}"
    yield ("", *(("with the plan", without, "planning adds") if plain else ("the run", "", "")), "")
    times = [_time(one["seconds"]) + ("" if one["error"] is None else f" ± {_time(one['error'])}") for one in found]
    yield _row("time", times, _time_added(joint, plain) if plain else "", "measured")
    lasts = [one["phases"][-1] for one in found]
    rates = [last["tokens_per_second"] for last in lasts]
    added = _share(rates) if all(last["measured"] > 1 for last in lasts) else UNKNOWN
    yield _row("tokens/s, at the end", [f"{rate:,.0f}" for rate in rates], added, "measured")
    if all(one["memory"] is not None for one in found):
        sizes = [one["memory"] for one in found]
        yield _row("GB at the peak", [f"{size / 1e9:.2f}" for size in sizes], _share(sizes), "measured")
    trained = [sum(one["trained"].values()) for one in found]
    added = f"{trained[0] - trained[-1]:+,}"
    yield _row("weights trained", [f"{size:,}" for size in trained], added, "counted")


def _row(name: str, cells: list[str], added: str, basis: str) -> Sequence[str]:
    return name, *cells, *([added] if len(cells) == 2 else ["", ""]), basis


def _time_added(joint: dict[str, Any], plain: dict[str, Any]) -> str:
    """What planning adds to the time, with two standard errors."""
    if joint["error"] is None or plain["error"] is None:
        return UNKNOWN
    ratio = joint["seconds"] / plain["seconds"]
    error = ratio * math.hypot(*(one["error"] / one["seconds"] for one in (joint, plain)))
    return f"{_percent(ratio - 1)} ± {error:.1%}"


def _share(values: list[float]) -> str:
    return _percent(values[0] / values[-1] - 1)


def _percent(share: float) -> str:
    return f"{share:+.1%}".replace("-", "−")


def _step(phase: dict[str, Any]) -> str:
    spread = f" ({phase['least']:.3g} to {phase['most']:.3g})" if phase["measured"] > 1 else ""
    return f"{phase['steps']:,} of {phase['seconds_per_step']:.3g} s{spread}, {phase['measured']} measured"


def _gpus(rows: list[dict[str, Any]]) -> Iterator[Sequence[str]]:
    yield "GPUs", "batch", "time", "tokens/s", "GB", "sharded", "plan", "waits for"
    for row in rows:
        memory, sharded = (_memory(row[name], row["room"]) for name in ("memory", "memory_sharded"))
        adds = "–" if row["adds"] is None else f"{row['adds']:+.0%}".replace("-", "−")
        name = f"{row['gpus']:>2} × {row['gpu']}"
        yield (
            name, f"{row['batch_size']:,}", _time(row["seconds"]), f"{row['tokens_per_second']:,.0f}", memory, sharded,
            adds, row["limit"],
        )  # fmt: skip


def _memory(size: float | None, room: float) -> str:
    """GB, with a mark where a GPU has less."""
    return "–" if size is None else f"{size / 1e9:.1f}" + ("!" if size > 0.95 * room else "")


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
