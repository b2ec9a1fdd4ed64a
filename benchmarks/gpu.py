"""`python -m benchmarks.gpu`: the measured comparison on a CUDA device, unchanged wherever there is one.

The same shapes, set-up, gate and providers as `benchmarks.kernels`; times come from CUDA events with the L2 cache
overwritten before each repetition, rates are measured on the device. Without a device it says so and ends with 0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from benchmarks import harness, kernels
from benchmarks.devices import known_device
from benchmarks.predict import predictions


@harness.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 (a wrong result), 2 (bad usage)."""
    parser = harness.parser_of("gpu", __doc__)
    kernels.add_arguments(parser)
    parser.set_defaults(malloc="default", processes=1)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured")
        return 0
    rows = kernels.measure_all(options, torch.device("cuda"))
    if (device := known_device(torch.cuda.get_device_name())) is not None:
        print(f"\n{predictions(rows, device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
