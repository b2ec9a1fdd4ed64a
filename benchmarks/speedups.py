"""`python -m benchmarks.speedups`: what each piece of planlm/speedups brings to a joint training step.

Seconds of a step and GB at its peak, with the piece off and on and all others on, in processes that take turns:
docs/speedups.md's table.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Sequence

from benchmarks import harness
from benchmarks.step import MODELS, ON_A_CPU, WINDOWS, Case, planlm_joint
from planlm import speedups
from planlm.progress import process_memory

DOCUMENTS = 3
"""That share a sequence."""

PIECES = [piece for piece in speedups.PIECES if piece != "llama"]
"""Of a CPU."""


def measure(case: Case, off: str) -> tuple[float, float]:
    """Seconds of the faster of two steps after a first, and GB at the peak beyond those before the model was built."""
    speedups.ON.discard(off)
    before = process_memory("VmRSS") or 0
    step = planlm_joint(case)
    times = [harness.timed(step, harness.CPU)[0] for _ in range(3)]
    return min(times[1:]), ((process_memory("VmHWM") or 0) - before) / 1e9


@harness.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 (bad usage)."""
    parser = harness.parser_of("speedups", __doc__)
    harness.add_names(parser, "models", MODELS, default=ON_A_CPU)
    harness.add_names(parser, "windows", WINDOWS)
    harness.add_names(parser, "lm", ("full", "freeze"))
    harness.add_number(parser, "processes", 3, 1, "of each setting; medians of them count")
    options = parser.parse_args(arguments)
    print("| case | piece | step, off : on | memory, off : on |\n|---|---|---|---|")
    for model, window, lm in itertools.product(options.models, options.windows, options.lm):
        case = Case(model, *WINDOWS[window], "bf16", lm, documents=DOCUMENTS)
        pieces = [piece for piece in PIECES if piece != "activation" or model == "gpt2"]
        found: dict[str, list[tuple[float, float]]] = {off: [] for off in ("nothing", *pieces)}
        for off in list(found) * options.processes:
            harness.note(f"{case}: {off} off")
            found[off].append(harness.in_new_process(measure, case, off))
        medians = {off: tuple(map(statistics.median, zip(*runs, strict=True))) for off, runs in found.items()}
        for piece in pieces:
            (seconds, memory), (fast, small) = medians[piece], medians["nothing"]
            print(f"| {case} | {piece} | {seconds:.2f} : {fast:.2f} s | {memory:.2f} : {small:.2f} GB |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
