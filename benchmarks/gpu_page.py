"""The page of text that `benchmarks.gpu` makes of what its stages found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from planlm.report.tables import align

Found = Mapping[str, Any]

STAGES = ("machine", "tests", "path", "losses", "blocks", "steps")
"""Of `benchmarks.gpu`, in their order; of the last two there is one for each dtype and LM."""


def page(found: Found) -> str:
    """Everything that has been measured so far, to be read from top to bottom."""
    parts = [_machine(found["machine"])] if "machine" in found else []
    parts += [_tests(found["tests"])] if "tests" in found else []
    parts += [_path(found["path"])] if "path" in found else []
    parts += [_losses(found["losses"])] if "losses" in found else []
    for name in [name for name in found if name.startswith("blocks, ")]:
        parts += [_block(case, measured) for case, measured in found[name].get("cases", {}).items()]
    rate = found.get("machine", {}).get("products", {}).get("bf16")
    parts += [_steps(name, stage, rate) for name, stage in found.items() if name.startswith("steps, ")]
    ends = [f"FAILED  {where}: {error}" for where, error in failures(found)]
    missing = [stage for stage in STAGES if not any(name.split(",")[0] == stage for name in found)]
    ends += [f"Not run: {', '.join(missing)}."] if missing else []
    return "\n\n".join([*parts, "\n".join(ends or ["Everything was run, and nothing failed."])]) + "\n"


def failures(found: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Where something failed, and how: the key "error" of every object."""
    for key, value in found.items() if isinstance(found, dict) else enumerate(found if isinstance(found, list) else ()):
        if key == "error":
            yield where, str(value)
        else:
            yield from failures(value, f"{where}, {key}" if where else key)


def finite(found: Any) -> Any:
    """The same with an error in place of every number that JSON does not have."""
    if isinstance(found, dict):
        return {name: finite(value) for name, value in found.items()}
    if isinstance(found, list):
        return [finite(value) for value in found]
    return {"error": str(found)} if isinstance(found, float) and not math.isfinite(found) else found


def _machine(stage: Found) -> str:
    if "error" in stage:
        return "machine: failed"
    rates = ", ".join(f"{rate / 1e12:,.0f} TFLOP/s {name}" for name, rate in stage["products"].items())
    return (
        f"{stage['device']} (compute capability {stage['capability']}, {stage['processors']} multiprocessors, "
        f"{stage['memory'] / 2**30:.0f} GiB, L2 {stage['l2'] / 2**20:.0f} MiB), driver {stage['driver']}\n"
        f"torch {stage['torch']}, Triton {stage['triton']}, CUDA {stage['cuda']}, Python {stage['python']}; "
        f"PlanLM {stage['planlm']} ({stage['commit']}), backend {stage['backend']}, {stage['date'][:10]}\n"
        f"Reached: {rates}, copies {stage['copies'] / 1e12:.2f} TB/s (read and written)"
    )


def _tests(stage: Found) -> str:
    return f"Tests on CUDA tensors: {' '.join(stage.get('summary', ['did not end']))}"


def _path(stage: Found) -> str:
    cells: list[Sequence[str]] = [("command", "s", "")]
    for name, part in stage.items():
        if not isinstance(part, dict):
            continue
        notes = []
        if "largest difference of losses" in part:
            notes += [
                f"losses differ by {part['largest difference of losses']:.1e}, "
                f"weights by {part['largest difference of weights']:.1e}"
            ]
        notes += [f"{key}: {value['tokens/s']:,.0f} tokens/s" for key, value in part.items() if _has_rate(value)]
        cells.append((name, f"{part['seconds']:.1f}" if "seconds" in part else "", "; ".join(notes) or _state(part)))
    return f"From text to a model that plans\n{align(cells, left=(0, 2))}"


def _has_rate(value: Any) -> bool:
    return isinstance(value, dict) and "tokens/s" in value


def _state(part: Found) -> str:
    return "failed" if "error" in part else ""


def _losses(stage: Found) -> str:
    cells: list[Sequence[str]] = [("cross-entropy, bf16", "µs", "TB/s of 6 bytes a logit")]
    for width, case in stage.items():
        for name, spent in case.get("times", {}).items() if isinstance(case, dict) else ():
            if "median" in spent:
                rate = case["least_bytes"] / spent["median"] / 1e12
                cells.append((f"{width} columns, {name}", f"{1e6 * spent['median']:,.0f}", f"{rate:.2f}"))
    return align(cells, left=(0,))


def _block(name: str, case: Found) -> str:
    if "error" in case:
        return f"Block {name}: failed"
    rows = case["providers"]
    strong = rows.get("strong eager", {})
    cells: list[Sequence[str]] = [
        ("", "µs", "× strong", "graphed µs", "× strong", "kernels µs", "launches", "model µs")
    ]
    for provider, row in rows.items():
        kernels = row.get("kernels", {}).get("list", [])
        cells.append(
            (
                provider,
                _micro(row.get("eager")),
                _over(row.get("eager"), strong.get("eager")),
                _micro(row.get("graph")),
                _over(row.get("graph"), strong.get("graph")),
                f"{1e6 * sum(kernel['seconds'] for kernel in kernels):,.0f}" if kernels else "",
                str(sum(kernel["launches"] for kernel in kernels)) if kernels else "",
                f"{1e6 * row['predicted']['seconds']:,.0f}" if "seconds" in row.get("predicted", {}) else "",
            )
        )
    return f"Block {name}, forward and backward\n{align(cells, left=(0,))}"


def _micro(spent: Found | None) -> str:
    return f"{1e6 * spent['median']:,.0f}" if spent and "median" in spent else "–"


def _over(spent: Found | None, other: Found | None) -> str:
    if not spent or not other or "median" not in spent or "median" not in other:
        return ""
    return f"{spent['median'] / other['median']:.2f}"


def _steps(name: str, stage: Found, rate: float | None) -> str:
    cells: list[Sequence[str]] = [("", "ms", "p20", "p80", "× plain", "tokens/s", "MFU", "host ms", "GB", "waits")]
    rows = {provider: row for provider, row in stage.items() if isinstance(row, dict)}
    plain = next((row["seconds"] for provider, row in rows.items() if "plain" in provider and "seconds" in row), None)
    for provider, row in rows.items():
        if "seconds" not in row:
            cells.append((provider, "failed", *[""] * 8))
            continue
        spent = row["seconds"]
        cells.append(
            (
                provider,
                *(f"{1e3 * spent[quantile]:.1f}" for quantile in ("median", "p20", "p80")),
                _over(spent, plain),
                f"{stage['tokens'] / spent['median']:,.0f}",
                f"{100 * stage['flops'] / spent['median'] / rate:.0f} %" if rate else "",
                f"{1e3 * row['host']['median']:.1f}" if "host" in row else "–",
                f"{row['memory'] / 1e9:.1f}",
                str(len(row["waits"])) if "waits" in row else "–",
            )
        )
    return f"Training step of {name.removeprefix('steps, ')}\n{align(cells, left=(0,))}"
