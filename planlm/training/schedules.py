"""Learning rates, oracle ratios and log lines as functions of the step."""

from __future__ import annotations

import math

from planlm.errors import InputError


def learning_rate_factor(
    step: int, total: int, *, start: int = 0, warmup: float = 0.05, schedule: str = "cosine"
) -> float:
    """Factor on the peak learning rate at `step` (0-based) of `total`.

    Rises linearly over `warmup * total` steps from `start`, the step at which the parameters join training: Adam's
    first updates have full size whatever the gradient's. `schedule` then decays to zero at `total`.
    """
    if step < start:
        return 0.0
    rise = min(1.0, (step - start + 1) / max(1.0, warmup * total))
    progress = min(1.0, step / max(1, total))
    decay = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[schedule]
    return rise * decay


def parse_oracle_mix(text: str) -> tuple[float, float]:
    """`RHO` or `RHO:RHO_END` as (first, last) ratio.

    Raises:
        InputError: not one or two numbers in [0, 1].
    """
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2) or not all(0.0 <= part <= 1.0 for part in parts):
        raise InputError(f"--oracle-mix {text!r}: expected RHO or RHO:RHO_END with numbers from 0 to 1, e.g. 0.5:0")
    return parts[0], parts[-1]


def oracle_ratio(
    step: int, total: int, ends: tuple[float, float], schedule: str = "linear", switch_at: float = 0.5
) -> float:
    """Oracle ratio at `step` (0-based): from `ends[0]` at the first step to `ends[1]` at the last.

    With `schedule` "switch" it is the first until the fraction `switch_at` of training is done, and then the other.
    """
    if schedule == "switch":
        return ends[step >= round(switch_at * total)]
    progress = min(1.0, step / max(1, total - 1))
    if schedule == "cosine":
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    return ends[0] + (ends[1] - ends[0]) * progress


def is_logged(step: int, total: int, every: int) -> bool:
    """Whether `step` (0-based) of `total` has a line in metrics.jsonl: the first, the last, and one of `every`."""
    return step in (0, total - 1) or (step + 1) % every == 0
