"""`python -m benchmarks.gpu`: the measured comparison on a CUDA device, unchanged wherever there is one.

The same shapes, set-up, gate and providers as `benchmarks.kernels`; times come from CUDA events with the L2 cache
overwritten before each repetition, rates are measured on the device. Without a device it says so and ends with 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks.arguments import add_arguments, check_arguments
from benchmarks.correctness import WrongResultError
from benchmarks.kernels import collect, report
from benchmarks.traffic import predictions
from planlm.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 (a wrong result), 2 (bad usage)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        check_arguments(options)
        if not torch.cuda.is_available():
            print("no CUDA device: nothing was measured")
            return 0
        rows = collect(options, torch.device("cuda"))
        report(options, rows)
        print(f"\n{predictions(rows)}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WrongResultError as error:
        print(f"wrong result: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
