"""Runs of seconds on the planted corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planlm.config import TrainConfig


def settings(planted: dict[str, str], out: Path, **others: Any) -> TrainConfig:
    """Small batches, every step logged."""
    values = {
        "corpus": planted["corpus"], "lm": planted["lm"], "out": str(out), "batch_size": 4, "window": 16,
        "precision": "fp32", "log_every": 1,
    }  # fmt: skip
    return TrainConfig(**{**values, **others})
