"""`python -m benchmarks.predict`: how long blocks and whole training steps take on GPUs, by a model, without a GPU.

Kernels are counted on tensors without data (`operators`); PlanLM's are compiled for each device and their machine code
is read (`machine_code`); what each takes is in `estimates`. Every figure says what it rests on: *counted* (sizes of
tensors, launches), *compiled* (registers, shared memory, instructions, cycles) or *assumed* (the devices' rates as far
as nobody measured them, the library's efficiencies, in its favour, and what a launch costs).

Host time stands beside it: launches at a stated cost each. Where it is the longer, it is what a step takes.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import block as blocks
from benchmarks import harness
from benchmarks.block import SHAPES, Block, Provider
from benchmarks.devices import DEVICES, Device
from benchmarks.estimates import ATTENTION, BASIS, GAP, RAMP, SPLIT_SECONDS, TILES, Estimate, estimates
from benchmarks.operators import Kernel, counted
from planlm.errors import InputError
from planlm.files import write_text
from planlm.kernels import projection
from planlm.report.tables import align

HOST = {"torch": 6e-6, "planlm": 20e-6}
"""Seconds of the host for one of torch's launches and one of PlanLM's, with autograd: assumed, what blocks of 28 layers
takes where nothing is launched, shared out over its launches."""

BLOCK_LIMIT, JOINT_LIMIT, PLAIN_LIMIT = 1.0, 1.05, 0.85
"""At most so much: PlanLM's block over strong eager's, its joint step over its plain one, that over eager's."""


def _in_form(streamed: bool) -> Provider:
    """PlanLM's operations in one of their two forms."""

    def run(block: Block) -> list[Tensor]:
        with mock.patch.object(projection, "_is_streamed", return_value=streamed):
            return list(blocks.planlm(block))

    return run


PROVIDERS: dict[str, Provider] = {
    "token-level": blocks.token_level,
    "strong eager": blocks.strong_eager,
    "composed": _in_form(streamed=False),
    "streamed": _in_form(streamed=True),
    "planlm": blocks.planlm,
}
"""`planlm` runs the one of its two forms that its rule chooses where nothing was measured."""


@dataclass(frozen=True)
class Prediction:
    """What one way to compute something is predicted to take on a device."""

    device: str
    case: str  # shape and dtype, or the LM
    provider: str
    kernels: list[Estimate]
    tokens: int = 0  # of a training step, as `flops`
    flops: float = 0.0  # of the LM

    @property
    def seconds(self) -> float:
        """On the device, kernel after kernel."""
        return sum(one.seconds for one in self.kernels)

    @property
    def launches(self) -> int:
        """Of kernels."""
        return sum(one.kernel.launches for one in self.kernels)

    @property
    def host(self) -> float:
        """Seconds of the host."""
        return sum(
            one.kernel.launches * HOST["torch" if one.kernel.launch is None else "planlm"] for one in self.kernels
        )

    @property
    def bytes(self) -> int:
        """Every kernel's reads and writes once."""
        return sum(one.kernel.bytes for one in self.kernels)

    @property
    def bound(self) -> str:
        """What the time goes into: shares of launches and of what kernels need longest."""
        shares = {"launches": sum(one.launch for one in self.kernels)}
        for one in self.kernels:
            shares[one.bound] = shares.get(one.bound, 0.0) + one.seconds - one.launch
        ordered = sorted(shares.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {100 * share / self.seconds:.0f} %" for name, share in ordered if share > 0)

    def as_json(self) -> dict[str, Any]:
        """Everything, kernel by kernel, with what it rests on."""
        kernels = [
            {
                "name": one.kernel.name,
                "phase": one.kernel.phase,
                "launches": one.kernel.launches,
                "bytes": one.kernel.bytes,
                "seconds": one.seconds,
                "launch": one.launch,
                "needs": one.needs,
                "bound": one.bound,
                "waves": one.waves,
                "detail": one.detail,
            }
            for one in self.kernels
        ]
        return {
            "device": self.device,
            "case": self.case,
            "provider": self.provider,
            "seconds": self.seconds,
            "host_seconds": self.host,
            "launches": self.launches,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "flops": self.flops,
            "kernels": kernels,
        }


def count(provider: Provider, block: Block, tables: int = 90) -> list[Kernel]:
    """Kernels of one forward and backward.

    Args:
        provider: the block's forward.
        block: inputs on the meta device.
        tables: the architecture whose tiles PlanLM's kernels take.
    """
    with counted(tables) as counter:
        blocks.forward_backward(provider, block)
    return counter.kernels


def predict_blocks(device: str, shape: str, dtype: str) -> list[Prediction]:
    """Every provider of one shape."""
    known = DEVICES[device]
    return [
        Prediction(device, f"{shape} {dtype}", name, estimates(_block(shape, dtype, name, known.tables), known))
        for name in PROVIDERS
    ]


@cache
def _block(shape: str, dtype: str, name: str, tables: int) -> list[Kernel]:
    block = blocks.setup(SHAPES[shape], harness.DTYPES[dtype], torch.device("meta"))
    return count(PROVIDERS[name], block, tables)


def predict_steps(device: str, lm: str) -> list[Prediction]:
    """Every variant of a training step of one LM."""
    from benchmarks.lm_steps import LMS, VARIANTS

    found, model, known = [], LMS[lm], DEVICES[device]
    for name in VARIANTS:
        kernels, flops = _step(lm, name, known.tables)
        case = f"{lm} {model.batch} × {model.window}"
        found.append(Prediction(device, case, name, estimates(kernels, known), model.tokens, flops))
    return found


@cache
def _step(lm: str, name: str, tables: int) -> tuple[list[Kernel], float]:
    from benchmarks.lm_steps import LMS, VARIANTS, count_step

    return count_step(LMS[lm], VARIANTS[name], tables)


# Tables


def block_table(found: Sequence[Prediction], parts: bool) -> str:
    """One line a provider; with `parts` its kernels below it, those of one name and size together."""
    strong = next(one for one in found if one.provider == "strong eager")
    cells: list[Sequence[str]] = [
        ("", "µs", "× strong", "launches", "MB", "host µs", "what the time goes into"),
        ("", "assumed", "", "counted", "counted", "assumed", "assumed"),
    ]
    for one in found:
        cells.append(
            (
                one.provider,
                f"{1e6 * one.seconds:,.0f}",
                f"{one.seconds / strong.seconds:.2f}",
                str(one.launches),
                f"{one.bytes / 1e6:,.0f}",
                f"{1e6 * one.host:,.0f}",
                one.bound,
            )
        )
        cells += [_part(*item) for item in _alike(one.kernels)] if parts else []
    return f"{found[0].case} on {DEVICES[found[0].device].name}\n{align(cells, left=(0, 6))}"


def step_table(found: Sequence[Prediction], parts: bool) -> str:
    """One line a variant, and below it its largest parts."""
    from benchmarks.lm_steps import part_of

    peak = DEVICES[found[0].device].products["bf16"]
    cells: list[Sequence[str]] = [
        ("", "ms", "tokens/s", "MFU", "launches", "GB", "host ms", "largest parts, ms"),
        ("", "assumed", "assumed", "assumed", "counted", "counted", "assumed", "assumed"),
    ]
    for one in found:
        sums: dict[str, float] = {}
        for each in one.kernels:
            sums[part_of(each.kernel)] = sums.get(part_of(each.kernel), 0.0) + each.seconds
        largest = sorted(sums.items(), key=lambda item: -item[1])[: 40 if parts else 5]
        cells.append(
            (
                one.provider,
                f"{1e3 * one.seconds:,.1f}",
                f"{one.tokens / one.seconds:,.0f}",
                f"{100 * one.flops / one.seconds / peak:.0f} %",
                str(one.launches),
                f"{one.bytes / 1e9:,.1f}",
                f"{1e3 * one.host:,.1f}",
                ", ".join(f"{name} {1e3 * seconds:,.1f}" for name, seconds in largest),
            )
        )
    return f"Training step of {found[0].case} on {DEVICES[found[0].device].name}\n{align(cells, left=(0, 7))}"


def _alike(kernels: Sequence[Estimate]) -> list[tuple[str, list[Estimate]]]:
    groups: dict[tuple[str, int, str], list[Estimate]] = {}
    for one in kernels:
        groups.setdefault((one.kernel.name, one.kernel.bytes, one.bound), []).append(one)
    return [(name, members) for (name, *_), members in groups.items()]


def _part(name: str, members: Sequence[Estimate]) -> Sequence[str]:
    first, seconds = members[0], sum(one.seconds for one in members)
    needs = ", ".join(f"{need} {1e6 * value:.1f} ({BASIS[need]})" for need, value in first.needs.items())
    detail = f"; {first.waves:.2g} waves, {first.detail} (compiled)" if first.detail else ""
    size = sum(one.kernel.bytes for one in members) / 1e6
    launches = sum(one.kernel.launches for one in members)
    return f"  {name}", f"{1e6 * seconds:,.1f}", "", str(launches), f"{size:,.1f}", "", f"each {needs}{detail}"


def assumptions(devices: Sequence[Device]) -> str:
    """What the figures rest on."""
    shares = [
        f"{kind} {forward:g} forward and {backward:g} backward on {device.name}"
        for device in devices
        for kind, (forward, backward) in ATTENTION[device.architecture].items()
    ]
    lines = [
        f"Assumed: {1e6 * GAP:g} µs between kernels and {1e6 * RAMP:g} µs to get one of torch's going; host "
        f"{1e6 * HOST['torch']:g} µs for a launch of torch's and {1e6 * HOST['planlm']:g} µs for one of PlanLM's.",
        f"Assumed of cuBLAS: the fastest of {len(TILES)} tiles and of every split of the sum "
        f"({1e6 * SPLIT_SECONDS:g} µs to add the parts), tiles of 128 × 256 at the rate of a large product.",
        f"Assumed of attention, of that rate: {'; '.join(shares)}.",
    ]
    for device in devices:
        rates = (
            f"{device.name}: {device.processors} SMs at {device.clock / 1e9:g} GHz, "
            f"{device.products['bf16'] / 1e12:g} TFLOP/s bf16 and {device.products['float32'] / 1e12:g} float32, "
            f"copies {device.copies / 1e12:g} TB/s, L2 {device.l2_bytes / 1e6:g} MB at {device.l2_rate / 1e12:g} TB/s."
        )
        lines.append(rates)
        lines += [f"  {what}: {source}" for what, source in device.sources.items()]
    return "\n".join(lines)


# Thresholds


def judged(found: Sequence[Prediction]) -> Iterator[tuple[bool, str]]:
    """Every threshold on what was predicted: whether it holds, and a line that says so."""
    cases: dict[tuple[str, str], dict[str, Prediction]] = {}
    for one in found:
        cases.setdefault((one.device, one.case), {})[one.provider] = one
    limits = [
        ("planlm", "strong eager", BLOCK_LIMIT),
        ("planlm joint", "planlm plain", JOINT_LIMIT),
        ("planlm plain", "plain eager", PLAIN_LIMIT),
    ]
    for (device, case), by_name in cases.items():
        for ours, theirs, limit in limits:
            if ours in by_name and theirs in by_name:
                ratio = by_name[ours].seconds / by_name[theirs].seconds
                text = f"{case} on {DEVICES[device].name}: {ours} {ratio:.3f} × {theirs}, at most {limit:g}"
                yield harness.verdict(ratio <= limit, text)


@harness.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 (a threshold missed), 2 (bad usage)."""
    parser = harness.parser_of("predict", __doc__)
    harness.add_names(parser, "devices", DEVICES)
    harness.add_names(parser, "shapes", SHAPES)
    harness.add_names(parser, "dtypes", harness.DTYPES, default=["bf16", "float32"])
    harness.add_names(parser, "lms", ("gpt2", "smollm2", "olmo-1b", "none"), default=["gpt2", "smollm2", "olmo-1b"])
    parser.add_argument("--parts", action="store_true", help="list every provider's kernels, and what each rests on")
    parser.add_argument("--bars", action="store_true", help="judge by the thresholds; 1 is the status where one fails")
    harness.add_file(parser, "json", "write what was predicted, kernel by kernel")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        raise InputError("counting PlanLM's launches needs triton: pip install triton")
    found: list[Prediction] = []
    for device in options.devices:
        for shape in options.shapes:
            for dtype in options.dtypes:
                found += (case := predict_blocks(device, shape, dtype))
                print(f"{block_table(case, options.parts)}\n", flush=True)
        for lm in options.lms:
            if lm != "none":
                found += (case := predict_steps(device, lm))
                print(f"{step_table(case, options.parts)}\n", flush=True)
    print(assumptions([DEVICES[name] for name in options.devices]))
    if options.json:
        sources = {name: DEVICES[name].sources for name in options.devices}
        written = {"basis": BASIS, "sources": sources, "predictions": [one.as_json() for one in found]}
        write_text(options.json, json.dumps(written, indent=1) + "\n")
    if not options.bars:
        return 0
    print()
    return harness.print_verdicts(judged(found))


if __name__ == "__main__":
    sys.exit(main())
