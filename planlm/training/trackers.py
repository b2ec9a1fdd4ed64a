"""Where a run's figures go besides `metrics.jsonl` (`--tracker`): TensorBoard's files, or Weights & Biases."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from planlm.config import LoopConfig
from planlm.errors import InputError
from planlm.files import write_text


class Tracker(Protocol):
    """Takes log lines of rank 0."""

    def log(self, line: dict[str, Any]) -> None: ...

    def text(self, name: str, text: str, step: int) -> None: ...

    def close(self, is_done: bool) -> None: ...


def check_tracker(name: str | None) -> None:
    """Raises InputError where the package of `--tracker` is not installed; it has the tracker's name."""
    if name is None:
        return
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # a folder of that name, as wandb itself makes one, is no package
        raise InputError(f"--tracker {name}: needs the package {name}: pip install planlm[{name}]")


def open_tracker(config: LoopConfig, run: Path, step: int) -> Tracker | None:
    """The tracker that is asked for, going on after `step` of the run in the folder `run`.

    Raises:
        InputError: it cannot be reached.
    """
    if config.tracker is None:
        return None
    return TensorBoard(run, step) if config.tracker == "tensorboard" else WeightsAndBiases(config, run)


class TensorBoard:
    """Event files in `tensorboard/`; what was written of steps after `step` is dropped."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, line: dict[str, Any]) -> None:
        """Write the numbers of a log line."""
        for name, value in _flat(line):
            self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def text(self, name: str, text: str, step: int) -> None:
        """Write a text."""
        self._writer.add_text(name, text, step)

    def close(self, is_done: bool) -> None:
        """No more lines come."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose id `wandb_id` keeps; variables of the environment say where to and how.

    Its own files stay where it puts them: links out of them would be links out of the run directory.
    """

    def __init__(self, config: LoopConfig, run: Path) -> None:
        import wandb

        kept = run / "wandb_id"
        if not kept.exists():
            write_text(kept, secrets.token_hex(8), run)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "planlm",
                name=run.resolve().name,
                id=kept.read_text(),
                resume="allow",
                config=asdict(config),
                allow_val_change=True,
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"--tracker wandb: {reason}; log in with `wandb login`, or set WANDB_MODE=offline, and --resume"
            ) from error

    def log(self, line: dict[str, Any]) -> None:
        """Send the numbers of a log line."""
        if line["step"] >= self._run.step:
            self._run.log(dict(_flat(line)), step=line["step"], commit=True)

    def text(self, name: str, text: str, step: int) -> None:
        """Send a text with the next log line, which is of this step or a later one."""
        if step >= self._run.step:
            self._run.log({name: text}, step=step, commit=False)

    def close(self, is_done: bool) -> None:
        """No more lines come; waits until what was sent has arrived."""
        self._run.finish(exit_code=0 if is_done else 1)


def _flat(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Names and numbers of a log line; those of inner objects as `outer/inner`."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif name != "step":
            yield prefix + name, value
