"""`python -m benchmarks.kernels`: the fused operations on the CPU, against three ways of writing them in PyTorch."""

from __future__ import annotations

import argparse
import itertools
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.arguments import add_arguments, check_arguments
from benchmarks.cases import measure
from benchmarks.clock import Budget, note
from benchmarks.correctness import WrongResultError
from benchmarks.results import Bar, Row, comparison, draw, judged, pooled, read_rows, table, write_rows
from planlm.allocator import keep_memory, start_with_huge_pages
from planlm.errors import InputError

_CPU_SHAPES = ("gpt2", "smollm2", "large-K")

BARS = (
    Bar("median", "planlm", "floor", 1.3, _CPU_SHAPES),
    Bar("median", "planlm", "strong eager", 1.0, _CPU_SHAPES),
    Bar("median", "planlm", "compiled", 1.0, _CPU_SHAPES),
    Bar("median", "planlm", "token-level", 0.05, ("gpt2",)),
    Bar("memory", "planlm", "strong eager", 0.25, ("large-K",)),
    Bar("memory", "planlm", "token-level", 0.05, ("gpt2",)),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 (a wrong result, or a bar failed), 2 (bad usage)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    add_arguments(parser)
    parser.add_argument(
        "--malloc",
        choices=("default", "keep", "both"),
        default="default",
        help="keep: glibc's malloc keeps freed memory, as in `planlm train`; both: two runs, one after the other",
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="measure each case in so many, and take medians; default %(default)s"
    )
    parser.add_argument("--bars", action="store_true", help="judge the medians; exit status 1 where one fails")
    options = parser.parse_args(arguments)
    if arguments is None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends what runs, and leaves no files
        if options.malloc == "keep":
            start_with_huge_pages()
    try:
        check_arguments(options)
        if options.processes < 1:
            raise InputError(f"--processes: got {options.processes}, needs at least 1")
        rows = _measured(options) if _single(options) else _in_processes(options)
        report(options, rows)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WrongResultError as error:
        print(f"wrong result: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:  # which has said more itself, unless it was killed
        print(f"error: the process of that case ended with status {error.returncode}", file=sys.stderr)
        return 2 if error.returncode == 2 else 1
    except KeyboardInterrupt:
        print(f"interrupted; done cases are in {options.out}" if options.out else "interrupted", file=sys.stderr)
        return 1
    passed = True
    for good, line in judged(rows, BARS) if options.bars else ():
        print(line)
        passed &= good
    return 0 if passed else 1


def report(options: argparse.Namespace, rows: Sequence[Row]) -> None:
    """The table on stdout, and what else was asked for."""
    print(table(rows))
    if options.compare:
        print(f"\n{comparison(rows, read_rows(options.compare))}")
    if options.plot:
        draw(rows, options.plot)
        note(f"drew {options.plot}")


def collect(options: argparse.Namespace, device: torch.device, malloc: str = "default") -> list[Row]:
    """Measure in this process, writing the rows out after every case: what is done stays when a run is cut off."""
    rows: list[Row] = []
    budget = Budget(options.repetitions, options.seconds)
    for case in measure(options.shapes, options.dtypes, options.providers, device, budget, malloc):
        rows += case
        if options.out:
            write_rows(options.out, rows)
    return rows


def _measured(options: argparse.Namespace) -> list[Row]:
    if options.malloc == "keep" and not keep_memory():
        raise InputError("--malloc keep: needs glibc, and this system has another C library")
    return collect(options, torch.device("cpu"), options.malloc)


def _single(options: argparse.Namespace) -> bool:
    """Whether one case is measured once: what a process can do."""
    return len(options.shapes) * len(options.dtypes) * options.processes == 1 and options.malloc != "both"


def _in_processes(options: argparse.Namespace) -> list[Row]:
    """A new process for every case and setting.

    malloc cannot be told to go back, and what earlier cases left in the heap decides whether blocks of a later one are
    mapped afresh: large-K in bf16 took strong eager 293 ms alone and 223 ms after others, PlanLM 232 and 224 ms.
    """
    rows: list[Row] = []
    settings = ("default", "keep") if options.malloc == "both" else (options.malloc,)
    order = itertools.product(range(1, options.processes + 1), settings, options.dtypes, options.shapes)
    for number, malloc, dtype, shape in order:
        note(f"process {number} of {options.processes}, malloc {malloc}: {shape} {dtype}")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.jsonl"
            command = [sys.executable, "-m", "benchmarks.kernels", f"--malloc={malloc}", f"--out={out}"]
            command += [f"--shapes={shape}", f"--dtypes={dtype}", f"--providers={','.join(options.providers)}"]
            command += [f"--repetitions={options.repetitions}", f"--seconds={options.seconds}"]
            # In a session of its own: Ctrl-C comes here alone, and ends it.
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True, start_new_session=True)
            rows += read_rows(out)
        if options.out:
            write_rows(options.out, pooled(rows))
    return pooled(rows)


if __name__ == "__main__":
    sys.exit(main())
