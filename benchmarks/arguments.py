"""What the command lines of the benchmarks have in common."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Mapping
from pathlib import Path

from benchmarks.blocks import DTYPES, PROVIDERS, SHAPES
from benchmarks.clock import Budget
from benchmarks.results import read_rows
from planlm.errors import InputError

_PICTURES = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the benchmarks that measure time."""
    for flag, known in (("shapes", SHAPES), ("dtypes", DTYPES), ("providers", PROVIDERS)):
        text = f"comma-separated, of {', '.join(known)}; default all"
        parser.add_argument(f"--{flag}", type=names_in, default=list(known), metavar="NAMES", help=text)
    parser.add_argument(
        "--repetitions", type=int, default=Budget.repetitions, help="of each provider, at most; default %(default)s"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=Budget.seconds,
        help="of repetitions of each provider, but three at least; default %(default)s",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="write the rows, one JSON object a line")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time over floor")
    parser.add_argument("--compare", type=Path, metavar="FILE.jsonl", help="compare with rows of an earlier commit")


def check_arguments(options: argparse.Namespace) -> None:
    """Refuse unknown names and missing files before anything is measured.

    Raises:
        InputError: names the flag, what it got and what it needs.
    """
    check_names(options, {"shapes": SHAPES, "dtypes": DTYPES, "providers": PROVIDERS})
    if options.repetitions < 2:
        raise InputError(f"--repetitions: got {options.repetitions}, needs at least 2 for a spread")
    if not 0 < options.seconds < math.inf:
        raise InputError(f"--seconds: got {options.seconds:g}, needs a number above 0")
    for file in (options.out, options.plot):
        if file and not file.absolute().parent.is_dir():
            raise InputError(f"{file}: its folder does not exist; create it first")
        if file and file.is_dir():
            raise InputError(f"{file}: is a folder; name a file in it")
    if options.plot and options.plot.suffix not in _PICTURES:
        raise InputError(f"--plot: got {options.plot}, needs a name that ends in {', '.join(_PICTURES)}")
    if options.compare:
        read_rows(options.compare)


def check_names(options: argparse.Namespace, known: Mapping[str, Collection[str]]) -> None:
    """Refuse names that a flag does not know.

    Raises:
        InputError: names the flag, what it got and what it needs.
    """
    for flag, names in known.items():
        given = getattr(options, flag)
        for name in given or [""]:
            if name not in names:
                raise InputError(f"--{flag}: got {name!r}, needs some of {', '.join(names)}")


def names_in(text: str) -> list[str]:
    """The names of a comma-separated list, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
