"""What the benchmarks share: their command lines, times of calls that take turns, rows of results, thresholds."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import functools
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

from planlm.arguments import Parser
from planlm.errors import InputError, MachineError
from planlm.files import write_text
from planlm.kernels.backend import choose
from planlm.precision import device_name
from planlm.signals import ending, terminate

Result = TypeVar("Result")

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}

LEAST_REPETITIONS = 3
"""A slow provider is repeated this often whatever its budget: fewer would have no spread."""

_STARTED = time.perf_counter()


class WrongResultError(RuntimeError):
    """A provider computes something else than the others: one line with provider, tensor and error."""


# Command lines


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Decorate a `main` so that it ends with a status and one line on stderr: 2 for bad usage, 1 for a wrong result.

    SIGTERM and a terminal that closes end it as Ctrl-C does, with the processes that it has started.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        if arguments is None:
            for number in ending():
                signal.signal(number, terminate)
        try:
            return main(arguments)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (WrongResultError, MachineError) as error:
            print(f"{'wrong result' if isinstance(error, WrongResultError) else 'error'}: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted; the file of --out, where one was asked for, has the cases done", file=sys.stderr)
        return 1

    return run


def parser_of(name: str, documentation: str | None) -> Parser:
    """A parser for `python -m benchmarks.NAME`, described by the first paragraph of the module's documentation."""
    return Parser(prog=f"python -m benchmarks.{name}", description=(documentation or "").split("\n\n")[0])


def add_names(parser: Parser, flag: str, known: Collection[str], default: Sequence[str] | None = None) -> None:
    """A flag for a comma-separated list of known names, each kept once; without `default`, all of them."""

    def names(text: str) -> list[str]:
        given = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        for name in given or [""]:
            if name not in known:
                raise argparse.ArgumentTypeError(f"got {name!r}, needs some of {', '.join(known)}")
        return given

    text = f"comma-separated, of {', '.join(known)}; default {', '.join(default) if default else 'all'}"
    parser.add_argument(f"--{flag}", type=names, default=list(default or known), metavar="NAMES", help=text)


def add_file(parser: Parser, flag: str, text: str, suffixes: Sequence[str] = ()) -> None:
    """A flag for a result; what could not be written is refused before anything is measured."""

    def path(given: str) -> Path:
        if not Path(given).absolute().parent.is_dir():
            raise argparse.ArgumentTypeError(f"{given}: its folder does not exist; create it first")
        if Path(given).is_dir():
            raise argparse.ArgumentTypeError(f"{given}: is a folder; name a file in it")
        if suffixes and Path(given).suffix not in suffixes:
            raise argparse.ArgumentTypeError(f"got {given}, needs a name that ends in {', '.join(suffixes)}")
        return Path(given)

    parser.add_argument(f"--{flag}", type=path, metavar="FILE", help=text)


def add_number(parser: Parser, flag: str, default: float, least: float, text: str) -> None:
    """A flag for a number of the default's type."""
    kind = type(default)

    def number(given: str) -> float:
        value = kind(given)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"got {given}, needs a number from {least:g} on")
        return value

    parser.add_argument(f"--{flag}", type=number, default=default, metavar="N", help=f"{text}; default {default}")


def add_flags(parser: Parser, providers: Collection[str], repetitions: int) -> None:
    """The flags of benchmarks that measure time: dtypes, providers, repetitions, and where the rows go."""
    add_names(parser, "dtypes", DTYPES)
    add_names(parser, "providers", providers)
    add_number(parser, "repetitions", repetitions, 2, "of each provider, at most")
    add_file(parser, "out", "write the rows, one JSON object a line")


def note(text: str) -> None:
    """A line of progress on stderr, with the seconds since the start."""
    print(f"[{time.perf_counter() - _STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


# Times


@dataclass(frozen=True)
class Budget:
    """When to stop repeating a provider: after `repetitions`, or earlier when it has run for `seconds`."""

    repetitions: int = 200
    seconds: float = 10.0

    def spent(self, times: Sequence[float]) -> bool:
        """Whether these times are enough."""
        return len(times) >= self.repetitions or (len(times) >= LEAST_REPETITIONS and sum(times) >= self.seconds)


def timed(run: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds that a call takes, and its result, so that freeing it is not timed.

    On CUDA: time between two events, after the L2 cache has been overwritten.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result
    _flush_buffer(device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, result


@functools.cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    """Twice the L2 cache."""
    return torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)


def interleaved(
    runs: Mapping[str, Callable[[], object]], device: torch.device, budget: Budget, warm_up: int = 10
) -> dict[str, list[float]]:
    """Seconds of every repetition by name, in the order A B C A B C …: what slows the machine down slows all of them.

    Compiling is over before. Each first makes `warm_up` runs, or as many as a tenth of the budget takes, that are not
    counted: the process grows to its size in them, and its first use of a page can cost more than the work on it.
    """
    for run in runs.values():
        spent: list[float] = []
        while len(spent) < warm_up and sum(spent) < budget.seconds / 10:
            spent.append(timed(run, device)[0])
    times: dict[str, list[float]] = {name: [] for name in runs}
    while waiting := [name for name, spent in times.items() if not budget.spent(spent)]:
        for name in waiting:
            times[name].append(timed(runs[name], device)[0])
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """The quantiles p20, median and p80."""
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20": p20, "median": statistics.median(values), "p80": p80}


def paired(times: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The spread of times over another provider's, round by round: what slowed a whole round down cancels."""
    return spread([ours / theirs for ours, theirs in zip(times, others, strict=False)])


def timing(times: Mapping[str, Sequence[float]], name: str) -> dict[str, Any]:
    """A row's keys of a provider's times, all providers' given: their number, their spread, and over the others."""
    over = {other: paired(times[name], times[other]) for other in times if other != name}
    return {"repetitions": len(times[name]), "over": over, **spread(times[name])}


def in_new_process(function: Callable[..., Result], *arguments: object, limit: float | None = None) -> Result:
    """What a function of a module returns in a process of its own, where nothing has been allocated before.

    After `limit` seconds the process is killed, and always what it has started and left behind.

    Raises:
        InputError, WrongResultError: the function did.
        MachineError: the process was killed, as for want of memory, or has printed a traceback, or took too long.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            raise MachineError(f"the process of that case was killed after {limit:g} s")
        result = receiver.recv()
        process.join(10)  # what it has started itself is put away as it ends
    except EOFError:
        process.join()
        raise MachineError(f"the process of that case ended with status {process.exitcode}") from None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()  # it may not have had a group of its own yet
        process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _send(sender: Connection, function: Callable[..., object], arguments: Sequence[object]) -> None:
    os.setsid()  # with what it starts it is a group, which Ctrl-C does not reach: the parent ends it
    try:
        result = function(*arguments)
    except (InputError, MachineError, WrongResultError) as error:
        result = error
    sender.send(result)


def keep_memory() -> None:
    """Let glibc's malloc keep what is freed; by default it maps every block over 32 MiB afresh, and zeroed.

    Raises:
        InputError: this system has another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        raise InputError("--malloc keep: needs glibc, and this system has another C library")
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped for itself
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never trimmed


# Rows of results


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one provider: a line of a results file, which is a JSON object of these fields."""

    provider: str
    dtype: str  # "float32" or "bf16"
    malloc: str = "default"  # or "keep": freed memory stayed with the process
    flops: float  # of a run
    repetitions: int  # runs that were timed
    median: float  # seconds of a run, as p20 and p80
    p20: float
    p80: float
    over: dict[str, dict[str, float]]  # by other provider: spread of the time over its time in the same round
    memory: int | None  # bytes at the peak, where they were measured
    device: str
    driver: str | None
    threads: int
    torch: str  # version, as the next two
    triton: str | None
    planlm: str | None
    backend: str  # that PlanLM chose
    commit: str | None
    date: str


AnyRow = TypeVar("AnyRow", bound=Row)

UNMEASURED: dict[str, Any] = {"repetitions": 0, "median": 0.0, "p20": 0.0, "p80": 0.0, "over": {}, "memory": None}
"""What a row says of a provider that ran out of memory."""


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines, the whole file at once."""
    write_text(path, "".join(json.dumps(asdict(row)) + "\n" for row in rows))


def read_rows(path: Path, kind: type[AnyRow]) -> list[AnyRow]:
    """Rows that `write_rows` wrote; keys that `kind` does not have, as of earlier versions, are passed over.

    Raises:
        InputError: no such file, no JSON lines in it, or lines of something else.
    """
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected rows that --out wrote ({error})") from None
    return [_row(row, kind, f"{path}: row {number}") for number, row in enumerate(rows, 1)]


def _row(given: Any, kind: type[AnyRow], where: str) -> AnyRow:
    values = given if isinstance(given, dict) else {}
    if values.get("status", "ok") != "ok":
        values = UNMEASURED | values
    if missing := [field.name for field in fields(kind) if field.default is MISSING and field.name not in values]:
        raise InputError(f"{where} is none that --out wrote; it lacks {', '.join(missing)}")
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})


@functools.cache
def provenance(device: torch.device) -> dict[str, Any]:
    """A row's keys from `device` to `date`, as they are here and now."""
    cuda = device.type == "cuda"
    backend = choose("plan_projection", device, torch.float32)
    return {
        "device": device_name(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "threads": torch.get_num_threads(),
        **{package: _version(package) for package in ("torch", "triton", "planlm")},
        "backend": backend.name if backend else "reference",
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """Of the tree that these benchmarks belong to; None where it is in no repository."""
    return _output("git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, run in this folder; None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


# Thresholds


def verdict(passed: bool, text: str) -> tuple[bool, str]:
    """Whether a threshold holds, and the line that says so."""
    return passed, f"{'PASS' if passed else 'FAIL'}  {text}"


def print_verdicts(verdicts: Iterable[tuple[bool, str]]) -> int:
    """Print every line; the exit status is 1 where one failed."""
    status = 0
    for passed, line in verdicts:
        print(line)
        status = status if passed else 1
    return status
