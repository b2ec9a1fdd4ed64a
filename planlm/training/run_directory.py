"""A run directory: `config.yaml`, `metrics.jsonl`, `checkpoints/` and what training leaves behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from planlm.config import LoopConfig
from planlm.distribution import on_rank_zero, rank, world_size
from planlm.errors import InputError
from planlm.files import appending, check_own, locked, read_json, to_json, write_json, write_text
from planlm.flat_yaml import read_flat
from planlm.training.checkpoint import planned_steps
from planlm.training.trackers import Tracker, check_tracker, open_tracker

FREE_TO_CHANGE = {
    "out", "resume", "json", "shard", "log_every", "checkpoint_every", "keep_checkpoints", "tracker",
    "corpus", "lm", "planner", "rehearsal", "mix", "dry_run", "steps", "epochs", "patience", "sample_every",
    "sample_prompts",
}  # fmt: skip
"""Settings that may differ when a run is resumed: they leave weights and losses as they are.

Or they are names of what is compared by its content, in `identity.json`: that may have moved. Or they make the run
longer.
"""

LOCK = "lock"
"""File in a run directory that its running command holds."""


def check_run(config: LoopConfig) -> None:
    """Find what is wrong with a run's settings before anything is loaded; nothing is written.

    Raises:
        InputError: as `Run` does, the folder cannot be written, a batch has less than one item a rank, or settings
            contradict each other.
    """
    if config.batch_size < world_size():
        raise InputError(f"--batch-size {config.batch_size}: {world_size()} processes share it; set at least that")
    if config.patience is not None and config.validate_every is None:
        raise InputError("--patience: counts measurements on the validation split; set --validate-every too")
    check_tracker(config.tracker)

    def look() -> None:
        path = Path(config.out)
        if _check_settings(path, config):
            with _alone(path):
                pass
        there = path
        while not os.path.lexists(there) and there != there.parent:
            there = there.parent
        if not there.is_dir():
            raise InputError(f"{there}: not a folder; choose another --out")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"{there}: cannot be written; choose another --out")

    on_rank_zero(look)


class Run(contextlib.ExitStack):
    """The run directory of a command; opening it refuses to mix two runs. Use as a context manager.

    Args:
        config: the command's configuration; written to `config.yaml`.
        identity: fingerprints of what is trained and on what; written to `identity.json`, and into checkpoints.
        steps: of the whole run.

    Raises:
        InputError: the directory holds a run already and `--resume` was not given, or one with other settings, of
            other content or of more steps, or one that another process is at work on.
    """

    def __init__(self, config: LoopConfig, identity: dict[str, str] | None = None, steps: int | None = None) -> None:
        self.path = Path(config.out)
        self.checkpoints = self.path / "checkpoints"
        self.metrics, self.samples = self.path / "metrics.jsonl", self.path / "samples.jsonl"
        self.identity, self._steps = identity or {}, steps
        super().__init__()
        try:
            on_rank_zero(lambda: self._open(config))
        except BaseException:
            self.close()
            raise
        self._config = config
        self._tracker: Tracker | None = None

    def _open(self, config: LoopConfig) -> None:
        _check_settings(self.path, config)
        self.path.mkdir(parents=True, exist_ok=True)
        self.enter_context(_alone(self.path))
        if _check_settings(self.path, config):  # again, now that nobody else can begin a run here
            self._check_identity(config)
            if self._steps is not None and self._steps < (before := planned_steps(self.checkpoints)):
                raise InputError(
                    f"{self.path}: a run of {before} steps cannot be resumed as one of {self._steps}; set --steps to "
                    f"{before} or more, or choose another --out"
                )
        # config.yaml makes it a run, so it comes last.
        write_json(self.path / "identity.json", self.identity, self.path)
        write_text(self.path / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False), self.path)

    def _check_identity(self, config: LoopConfig) -> None:
        """A missing `identity.json` is left to the checkpoints, which have it too."""
        path = self.path / "identity.json"
        if path.exists() and (changed := differences(read_json(path), self.identity)):
            given = {name: getattr(config, name, None) or "" for name in changed}
            shown = {name: value if isinstance(value, str) else " ".join(value) for name, value in given.items()}
            now = ", ".join(f"{name} {value}".rstrip() for name, value in shown.items())
            raise InputError(
                f"{self.path}: cannot resume with other content than the run began with ({now}, now another); give "
                "what it began with, or choose another --out"
            )

    def last_line(self, step: int | None = None) -> dict[str, Any]:
        """The newest object of `metrics.jsonl`, or that of a step; empty where somebody has taken that away."""
        return next((line for _, line in reversed(_lines(self.metrics)) if step in (None, line["step"])), {})

    def log(self, line: dict[str, Any]) -> None:
        """Append one object to `metrics.jsonl`; what is not finite is null there, as JSON has no such numbers."""
        if rank() > 0:
            return
        with appending(self.metrics, within=self.path) as file:
            file.write(to_json(line) + "\n")
        if self._tracker is not None:
            self._tracker.log(line)

    def log_samples(self, samples: list[dict[str, Any]]) -> None:
        """Append objects to `samples.jsonl`, each with `step`, `prompt` and `text`."""
        with appending(self.samples, within=self.path) as file:
            for sample in samples:
                file.write(json.dumps(json.loads(to_json(sample)), ensure_ascii=False) + "\n")
        if self._tracker is not None:
            for number, sample in enumerate(samples):
                self._tracker.text(f"samples/{number}", f"{sample['prompt']}{sample['text']}", sample["step"])

    def sync(self) -> None:
        """Have what is logged on the disk: a checkpoint must not outlive the lines before it."""
        for path in (self.metrics, self.samples):
            if rank() == 0 and path.exists():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def forget_after(self, step: int) -> None:
        """Drop logged lines of steps after `step`: a resumed run writes them again."""
        on_rank_zero(lambda: self._forget_after(step))

    def _forget_after(self, step: int) -> None:
        if (tracker := open_tracker(self._config, self.path, step)) is not None:
            self._tracker = tracker
            self.push(lambda error, *_: tracker.close(is_done=error is None))
        for path in (self.metrics, self.samples):
            if path.exists():
                kept = [text + "\n" for text, line in _lines(path) if line["step"] <= step]
                write_text(path, "".join(kept), self.path)


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a log that are of a step, as text and object; whatever else is there is left out."""
    found = []
    for text in path.read_text(errors="replace").split("\n") if path.exists() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # half a line from a process that was killed
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            found.append((text, line))
    return found


def differences(before: dict[str, Any], now: dict[str, str]) -> list[str]:
    """Names of what two identities do not have alike."""
    return [name for name in now | before if before.get(name) != now.get(name)]


def _check_settings(path: Path, config: LoopConfig) -> bool:
    """Whether the directory holds a run, which `config` may continue."""
    written = path / "config.yaml"
    if not os.path.lexists(written):
        ours = (LOCK, "identity.json")
        if path.is_dir() and any(
            not file.name.endswith(".partial") and file.name not in ours for file in path.iterdir()
        ):
            raise InputError(f"{path}: is not empty and holds no run; choose another --out")
        return False
    check_own(path)
    if not config.resume:
        with contextlib.suppress(OSError), _alone(path):  # who is at work there is the better answer
            pass
        raise InputError(f"{path}: holds a run already; continue it with --resume or choose another --out")
    try:
        before, settings = asdict(type(config)(**read_flat(written))), asdict(config)
    except (InputError, TypeError):  # no file of settings, or of others
        raise InputError(f"{written}: damaged; choose another --out, or delete the run") from None
    changed = [name for name in settings if name not in FREE_TO_CHANGE and before[name] != settings[name]]
    if changed:
        was = ", ".join(f"{name} was {before[name]!r}, now {settings[name]!r}" for name in changed)
        raise InputError(f"{path}: cannot resume with other settings ({was})")
    return True


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Work in a run directory in which nobody else does.

    Raises:
        InputError: somebody else does.
    """
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(locked(path / LOCK))
        except BlockingIOError as held:
            raise InputError(
                f"{path}: {held.strerror} is at work on this run; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise InputError(f"{path / LOCK}: a link; delete it") from None
        yield
