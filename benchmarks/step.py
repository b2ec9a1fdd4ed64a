"""`python -m benchmarks.step`: a training step of PlanLM, plain and joint, against eager PyTorch and the authors."""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.arguments import check_names, names_in
from benchmarks.blocks import DTYPES
from benchmarks.cases import paired, provenance
from benchmarks.clock import Budget, interleaved, note
from benchmarks.results import Row, quantiles, write_rows
from benchmarks.steps import MODELS, PLAIN, PROVIDERS, Case, make_lm
from planlm.allocator import keep_memory, start_with_huge_pages
from planlm.errors import InputError
from planlm.progress import process_memory
from planlm.training.flops import lm_flops, matrix_product_rate

WINDOWS = {"128x32": (128, 32), "1024x4": (1024, 4)}
CPU = torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 (bad usage)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    known = {"models": MODELS, "windows": WINDOWS, "dtypes": DTYPES, "lm": ("full", "freeze"), "providers": PROVIDERS}
    for flag, names in known.items():
        text = f"comma-separated, of {', '.join(names)}; default all"
        parser.add_argument(f"--{flag}", type=names_in, default=list(names), metavar="NAMES", help=text)
    parser.add_argument("--malloc", choices=("default", "keep"), default="default", help="keep: as in `planlm train`")
    parser.add_argument("--repetitions", type=int, default=5, help="of each provider; default %(default)s")
    parser.add_argument("--no-memory", action="store_true", help="leave out the runs that measure peak memory")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="write the rows, one JSON object a line")
    options = parser.parse_args(arguments)
    try:
        check_names(options, known)
        if options.repetitions < 2:
            raise InputError(f"--repetitions: got {options.repetitions}, needs at least 2 for a spread")
        if options.malloc == "keep" and arguments is None:
            start_with_huge_pages()
        if options.malloc == "keep" and not keep_memory():
            raise InputError("--malloc keep: needs glibc, and this system has another C library")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for case in _cases(options):
        found = [name for name in options.providers if case.lm == "full" or name not in PLAIN]
        measured = _measure(case, found, options)
        print(_table(case, measured), flush=True)
        rows += measured
        if options.out:
            write_rows(options.out, rows)
    return 0


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    for model, window, dtype, lm in itertools.product(options.models, options.windows, options.dtypes, options.lm):
        yield Case(model, *WINDOWS[window], dtype, lm)


def _measure(case: Case, names: Sequence[str], options: argparse.Namespace) -> list[Row]:
    """Times interleaved in this process, then peak memory of each provider in a process of its own."""
    rate = matrix_product_rate(DTYPES[case.dtype], CPU)
    lm = make_lm(case.model)
    flops = lm_flops(
        lm, case.window * case.rows, case.window, trained=case.lm == "full", first_layer=2 if case.lm == "freeze" else 0
    )
    del lm
    note(f"{case}: {flops / 1e12:.2f} TFLOP at {rate / 1e9:,.0f} GFLOP/s; timing {', '.join(names)}")
    steps = {name: PROVIDERS[name](case) for name in names}
    times = interleaved(steps, CPU, Budget(options.repetitions, 600.0), warm_up=2)
    rate = max(rate, matrix_product_rate(DTYPES[case.dtype], CPU))
    del steps
    rows = []
    for name in names:
        p20, median, p80 = quantiles(times[name])
        memory = None if options.no_memory else _in_process(case, name, options.malloc)
        rows.append(
            {
                "model": case.model, "window": case.window, "rows": case.rows, "dtype": case.dtype, "lm": case.lm,
                "provider": name, "malloc": options.malloc, "median": median, "p20": p20, "p80": p80,
                "repetitions": len(times[name]), "memory": memory, "flops": flops, "rate": rate,
                "tokens_per_second": case.window * case.rows / median, "utilisation": flops / median / rate,
                "over": {other: paired(times[name], times[other]) for other in names if other != name},
            } | provenance(CPU)
        )  # fmt: skip
    return rows


def _in_process(case: Case, name: str, malloc: str) -> int | None:
    """Bytes of resident memory at the peak of three steps, beyond those before the model was built."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(functools.partial(_peak_memory, case, name, malloc))


def _peak_memory(case: Case, name: str, malloc: str) -> int | None:
    if malloc == "keep":
        keep_memory()
    before = process_memory("VmRSS")
    step = PROVIDERS[name](case)
    for _ in range(3):
        step()
    peak = process_memory("VmHWM")
    return None if peak is None or before is None else peak - before


def _table(case: Case, rows: Sequence[Row]) -> str:
    lines = [f"{case}: {rows[0]['flops'] / 1e12:.2f} TFLOP, {rows[0]['rate'] / 1e9:,.0f} GFLOP/s"]
    lines.append(f"{'provider':<14}{'seconds':>9}{'p20':>8}{'p80':>8}{'tokens/s':>10}{'MFU':>8}{'GB':>7}  over others")
    for row in rows:
        memory = "–" if row["memory"] is None else f"{row['memory'] / 1e9:.2f}"
        over = ", ".join(f"{ratio['median']:.3f} {other}" for other, ratio in row["over"].items())
        lines.append(
            f"{row['provider']:<14}{row['median']:9.3f}{row['p20']:8.3f}{row['p80']:8.3f}"
            f"{row['tokens_per_second']:10,.0f}{100 * row['utilisation']:6.1f} %{memory:>7}  {over}"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
