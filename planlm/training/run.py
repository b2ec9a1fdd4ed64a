"""A run directory: `config.yaml`, `metrics.jsonl`, `checkpoints/` and what training leaves behind."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from planlm.config import PlannerConfig, TrainConfig
from planlm.distribution import first_rank_does, rank
from planlm.errors import InputError
from planlm.files import appending, check_own, write_text

FREE_TO_CHANGE = {"out", "resume", "json", "shard", "log_every", "checkpoint_every", "keep_checkpoints", "tensorboard"}
"""Settings that may differ when a run is resumed: they leave weights and losses as they are."""


class Run:
    """The run directory of a command; opening it refuses to mix two runs.

    Args:
        config: the command's configuration; written to `config.yaml`.

    Raises:
        InputError: the directory holds a run already and `--resume` was not given, or one with other settings.
    """

    def __init__(self, config: PlannerConfig | TrainConfig) -> None:
        self.path = Path(config.out)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        written = self.path / "config.yaml"
        if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise InputError("--tensorboard: needs the package tensorboard: pip install planlm[tensorboard]")
        first_rank_does(lambda: self._open(config, written))
        self._has_board, self._board = config.tensorboard, None

    def _open(self, config: PlannerConfig | TrainConfig, written: Path) -> None:
        check_own(self.path)
        settings = asdict(config)
        if written.exists():
            if not config.resume:
                raise InputError(f"{self.path}: holds a run already; continue it with --resume or choose another --out")
            before = _read(written)
            changed = [name for name in settings if name not in FREE_TO_CHANGE and before.get(name) != settings[name]]
            if changed:
                was = ", ".join(f"{name} was {before.get(name)!r}, now {settings[name]!r}" for name in changed)
                raise InputError(f"{self.path}: cannot resume with other settings ({was})")
        elif self.path.exists() and any(not file.name.endswith(".partial") for file in self.path.iterdir()):
            raise InputError(f"{self.path}: is not empty and holds no run; choose another --out")
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(written, yaml.safe_dump(settings, sort_keys=False))

    def last_line(self) -> dict[str, Any]:
        """The newest object of `metrics.jsonl`; empty where somebody has taken that away."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        line: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return line

    def log(self, line: dict[str, Any]) -> None:
        """Append one object to `metrics.jsonl`; what is not finite is null there, as JSON has no such numbers."""
        if rank() > 0:
            return
        with appending(self.metrics, self.path) as file:
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in _flat(line):
                self._board.add_scalar(name, value, line["step"])
            self._board.flush()

    def sync(self) -> None:
        """Have what is logged on the disk: a checkpoint must not outlive the lines before it."""
        if rank() == 0 and self.metrics.exists():
            with self.metrics.open("rb") as file:
                os.fsync(file.fileno())

    def forget_after(self, step: int) -> None:
        """Drop logged lines of steps after `step`: a resumed run writes them again."""
        if self._has_board and rank() == 0:
            self._board = _board(self.path / "tensorboard", step + 1)
        if not self.metrics.exists() or rank() > 0:
            return
        kept = []
        for text in self.metrics.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # half a line from a process that was killed
                continue
            if isinstance(line, dict) and line["step"] <= step:
                kept.append(text)
        write_text(self.metrics, "".join(text + "\n" for text in kept))


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, which drops what is there from `step` on."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Names and numbers of a log line; those of inner objects as `outer/inner`."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif name != "step":
            yield prefix + name, value


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: damaged; choose another --out, or delete the run")
    return settings
