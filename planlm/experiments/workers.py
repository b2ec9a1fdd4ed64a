"""Tasks in processes of their own, so many at a time, each with its share of the cores or a GPU of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from planlm.errors import InputError, MachineError
from planlm.experiments.tasks import Task
from planlm.home import python_module
from planlm.ranks import local_rank, local_world_size, world_size
from planlm.terminal import note, silence_libraries

MEMORY = 4 << 30
"""Bytes that a cell is counted with where nothing is said about --jobs."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC", "GROUP_", "ROLE_", "LOCAL_")
"""What torchrun says to a rank and its cells must not hear: each is a process of its own."""


@dataclass(frozen=True)
class Work:
    """A process and the tasks that it does one after another, each with a record of its own."""

    tasks: tuple[Task, ...]
    process: subprocess.Popen[str]
    since: float


class Workers:
    """Processes at work; use as a context manager, which stops them at its end.

    Args:
        out: the experiment's folder; what processes print goes to files in its `logs/`.
        jobs: processes at a time, or None for as many as the machine has room for.
    """

    def __init__(self, out: Path, jobs: int | None) -> None:
        self.out, self._devices = out, _devices()
        self.jobs = jobs or _default_jobs(self._devices)
        self.threads = max(1, _cores() // (self.jobs * local_world_size()))
        self.running: dict[int, Work] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        """Let each finish its step and write a checkpoint; a second Ctrl-C does not wait."""
        processes = [work.process for work in self.running.values()]
        for process in processes:
            process.terminate()
        try:
            for process in processes:
                process.wait()
        except KeyboardInterrupt:
            for process in processes:
                process.kill()
            raise

    @property
    def has_room(self) -> bool:
        """Whether another process can start."""
        return len(self.running) < self.jobs

    def is_free(self, task: Task) -> bool:
        """Whether nobody here is at the task, or works in its folder."""
        return all(task.folder != other.folder for work in self.running.values() for other in work.tasks)

    def start(self, *tasks: Task) -> None:
        """Start a process that does these tasks one after another."""
        slot = next(number for number in range(self.jobs) if number not in self.running)
        told = [
            {name: getattr(task, name) for name in ("key", "kind", "name", "folder", "settings")}
            | {"needs": [needed.key for needed in task.needs]}
            for task in tasks
        ]
        with self.log(tasks[0]).open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*python_module("planlm.experiments.cell"), str(self.out)],
                env=self._environment(slot, tasks[0].kind),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has failed already, and its log says how
            process.stdin.write(json.dumps(told) + "\n")
            process.stdin.flush()  # and stays open: its end tells the process that this one has gone
        self.running[slot] = Work(tasks, process, time.monotonic())

    def ended(self) -> Iterator[Work]:
        """Processes that have ended since the last call."""
        for slot, work in list(self.running.items()):
            if work.process.poll() is not None:
                yield self.running.pop(slot)

    def reason(self, work: Work) -> str:
        """Why a process failed: its last line, or the signal that ended it."""
        status = work.process.returncode
        return f"killed by signal {-status}" if status < 0 else self.last_line(work).removeprefix("error: ")

    def log(self, task: Task) -> Path:
        """The file with what the process prints that begins with this task."""
        return self.out / "logs" / f"{task.kind}-{task.key}.log"

    def last_line(self, work: Work) -> str:
        """The newest line that a process has printed."""
        with self.log(work.tasks[0]).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _environment(self, slot: int, kind: str) -> dict[str, str]:
        """For a process: alone, with its share of the cores, on its GPU. While a corpus is made nothing else can be."""
        threads = max(1, _cores() // local_world_size()) if kind == "corpus" else self.threads
        found = {name: value for name, value in os.environ.items() if not name.startswith(_TORCHRUN)}
        given = found.get("OMP_NUM_THREADS", "")
        # torchrun sets 1 by itself; a user who sets fewer than the share has a reason
        is_users = given.isascii() and given.isdigit() and int(given) > 0 and world_size() == 1
        found["OMP_NUM_THREADS"] = str(min(threads, int(given)) if is_users else threads)
        if self._devices:
            found["CUDA_VISIBLE_DEVICES"] = self._devices[(local_rank() * self.jobs + slot) % len(self._devices)]
        return found | {"PYTHONUNBUFFERED": "1"}


def _devices() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES has them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names[:count] or [str(number) for number in range(count)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default_jobs(devices: list[str]) -> int:
    """Of this rank: one a GPU, or one a core as far as the memory goes; under torchrun one."""
    if world_size() > 1:
        return 1
    if devices:
        return len(devices)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(_cores(), memory // MEMORY))


def exit_status(work: Callable[[], object]) -> int:
    """Do `work` in a process that another one started, libraries quiet; its exit status, as the command line has it.

    The last line on stderr is then the reason, for who started it to pass on.
    """
    silence_libraries()
    try:
        work()
    except (InputError, MachineError) as error:
        note(f"error: {error}")
        return error.status
    except KeyboardInterrupt:
        return 1
    return 0
