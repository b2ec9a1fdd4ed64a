"""Compiled Triton kernels as `benchmarks.predict` sees them: resources, loops, and cycles of one program.

A program's cycles come from its machine code (SASS). The warps of one scheduler are followed in order: an instruction
is issued where its operands are ready and the scheduler is free. Loads, shared memory, special functions and tensor
cores answer after the cycles below. What comes out is how long the program takes alone on its SM; what it takes from
the SM, as issue slots and cycles of the tensor cores, is counted beside it.

Compiled by Triton for an architecture, without a device; kept on disk, by all that decides the code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import TYPE_CHECKING

import triton

from benchmarks.devices import Device
from planlm.files import write_text
from planlm.kernels import environment

if TYPE_CHECKING:
    from benchmarks.compile_report import Job
    from planlm.kernels.triton_launch import Launch

LATENCIES = {
    "LDS": 30, "LDSM": 33, "SHFL": 24, "MUFU": 24, "BAR": 20, "S2R": 20, "REDUX": 20, "LDC": 30, "I2F": 16, "F2F": 16,
    "F2I": 16, "R2UR": 10, "VOTE": 10,
}  # fmt: skip
"""Cycles to a result, by opcode, 5 for all others: assumed, as microbenchmarks of sm_80 to sm_90 show them."""

NARROW = {"MUFU": 8, "F2F": 8, "I2F": 8, "F2I": 8}
"""Cycles that a warp's instruction holds its unit, where that is narrower than a warp (Programming Guide)."""

MMA_SYNC = 0.62
"""Share of an sm_90's tensor cores that instructions other than wgmma reach: assumed, as microbenchmarks show."""

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*)([.\w]*)\s*([^;]*?)\s*;", re.M)
_REGISTER = re.compile(r"\b(U?[RP])(\d+)(\.64)?\b")
_TARGET = re.compile(r"\b0x([0-9a-f]+)$")
_NO_RESULT = {"ST", "STG", "STS", "STSM", "BAR", "BRA", "EXIT", "RED", "DEPBAR", "LDGDEPBAR", "LDGSTS", "WARPGROUP"}
_HMMA = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}
_VERSION = 2
"""Of what is kept on disk."""


@dataclass(frozen=True)
class Cost:
    """What a program takes for a stretch of code.

    Attributes:
        alone (float): cycles until it is through, alone on its SM.
        slots (float): cycles of the SM's four schedulers, or of a narrow unit where that is longer.
        tensor (float): cycles of the SM's tensor cores.
        flops (int): of its products.
        loaded (int): bytes asked of global memory.
    """

    alone: float = 0.0
    slots: float = 0.0
    tensor: float = 0.0
    flops: int = 0
    loaded: int = 0

    def plus(self, other: Cost, times: float) -> Cost:
        """This, and another one so many times."""
        return Cost(*(own + times * more for own, more in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Code:
    """A kernel, compiled for a device."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread
    shared: int  # bytes of a program
    warps: int
    straight: Cost  # every instruction once
    loops: tuple[Cost, ...]  # an iteration without those of loops within, in order of address

    def resident(self, device: Device) -> int:
        """Programs that an SM holds at a time."""
        of_warp = -(-self.registers * 32 // 256) * 256
        by_registers, by_shared = device.registers // (of_warp * self.warps), device.shared // (self.shared + 1024)
        return max(1, min(device.blocks, device.warps // self.warps, by_registers, by_shared))


def code_of(launch: Launch, device: Device) -> Code:
    """What a launch runs on a device, from disk or compiled now."""
    from benchmarks.compile_report import make_job

    job = make_job("predict", launch, device.architecture, "")
    model = _VERSION, triton.__version__, device.tensor, device.latency, LATENCIES, NARROW, MMA_SYNC
    key = hashlib.sha256(repr((model, launch.kernel.cache_key, job.code)).encode()).hexdigest()[:32]
    if key not in _known:
        _known[key] = _from_disk(key) or _compiled(key, job, device)
    return _known[key]


_known: dict[str, Code] = {}


def _from_disk(key: str) -> Code | None:
    try:
        values = json.loads((environment.cache() / "machine_code" / f"{key}.json").read_text())
        straight, loops = Cost(*values.pop("straight")), tuple(Cost(*loop) for loop in values.pop("loops"))
        return Code(**values, straight=straight, loops=loops)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _compiled(key: str, job: Job, device: Device) -> Code:
    from benchmarks.compile_report import machine_code

    compiled, resources, text = machine_code(job)
    warps = job.tiles.num_warps
    straight, loops = analysed(text, warps, device)
    spilled = max(resources["STACK"], resources["LOCAL"])
    code = Code(resources["REG"], spilled, compiled.metadata.shared, warps, straight, loops)
    file = environment.cache() / "machine_code" / f"{key}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    values = asdict(code) | {"straight": astuple(straight), "loops": [astuple(loop) for loop in loops]}
    write_text(file, json.dumps(values) + "\n")
    return code


def analysed(text: str, warps: int, device: Device) -> tuple[Cost, tuple[Cost, ...]]:
    """Cost of every instruction once, and of an iteration of each loop, of what cuobjdump prints.

    A loop is what lies between a backward branch and its target. Code behind the last exit is the rare way of
    instructions that are not to be seen elsewhere, and is left out.
    """
    code = [Instruction(*found) for found in _LINE.findall(text)]
    last = max((number for number, one in enumerate(code) if one.opcode == "EXIT"), default=len(code) - 1)
    code = code[: last + 1]
    spans = sorted({(one.target, one.address) for one in code if one.target is not None and one.target <= one.address})
    loops = []
    for begin, end in spans:
        within = [span for span in spans if span != (begin, end) and begin <= span[0] and span[1] <= end]
        own = [
            one
            for one in code
            if begin <= one.address <= end and not any(first <= one.address <= last for first, last in within)
        ]
        timeline, ends = Timeline(warps, device), []
        for _ in range(4):  # what the first iterations wait for is there later
            timeline.run(own)
            ends.append(timeline.now)
        loops.append(replace(_counted(own, warps, device), alone=(ends[3] - ends[1]) / 2))
    timeline = Timeline(warps, device)
    timeline.run(code)
    return replace(_counted(code, warps, device), alone=timeline.now), tuple(loops)


class Instruction:
    """One of SASS: what it is, and which registers it writes and reads."""

    def __init__(self, address: str, guard: str, opcode: str, modifiers: str, operands: str) -> None:
        self.address, self.opcode, self.modifiers, self.operands = int(address, 16), opcode, modifiers, operands
        found = _TARGET.search(operands) if opcode == "BRA" else None
        self.target = int(found[1], 16) if found else None
        given = [] if not operands else operands.split(", ")
        wide = self.width // 4
        number = 0
        if opcode not in _NO_RESULT and given:
            number = 2 if len(given) > 2 and (opcode == "SHFL" or re.fullmatch(r"U?P[\dT]", given[1])) else 1
        if opcode in ("HMMA", "CS2R") or ".WIDE" in modifiers:
            wide = 4 if opcode == "HMMA" else 2
        self.results = {name for operand in given[:number] for name in _registers(operand, wide)}
        widths = [4, 2, 4] if opcode == "HMMA" else [1] * len(given)
        if opcode in ("STG", "STS", "ST") and given:
            widths[-1] = wide
        sources = zip(given[number:], widths, strict=False)
        self.sources = {name for operand, width in sources for name in _registers(operand, width)}
        self.sources |= set(_registers(guard, 1))

    @property
    def width(self) -> int:
        """Bytes of each thread's access."""
        if self.opcode == "LDSM":
            return 16 if self.modifiers.endswith("4") else 8 if self.modifiers.endswith("2") else 4
        return 16 if ".128" in self.modifiers else 8 if ".64" in self.modifiers else 4

    def flops(self, warps: int) -> int:
        """FLOPs of its product, of all warps; an HGMMA is of four of them together."""
        if self.opcode == "HGMMA":
            rows, columns, depth = map(int, self.modifiers.split(".")[1].split("x"))
            return 2 * rows * columns * depth * warps // 4
        if self.opcode == "HMMA":
            return 2 * _HMMA[self.modifiers.split(".")[1]] * warps
        return 0

    def tensor(self, warps: int, device: Device) -> float:
        """Cycles of the SM's tensor cores, of all warps."""
        kind = "tf32" if "TF32" in self.modifiers else "bf16"
        share = MMA_SYNC if self.opcode == "HMMA" and device.architecture == 90 else 1.0
        return self.flops(warps) / (device.tensor[kind] * share)


def _registers(operand: str, width: int) -> Iterator[str]:
    for name, number, pair in _REGISTER.findall(operand):
        for more in range(2 if pair else width if name == "R" else 1):
            yield f"{name}{int(number) + more}"


def _counted(code: Sequence[Instruction], warps: int, device: Device) -> Cost:
    narrow = sum(NARROW.get(one.opcode, 0) for one in code)
    return Cost(
        slots=max(len(code), narrow) * warps / 4,
        tensor=sum(one.tensor(warps, device) for one in code),
        flops=sum(one.flops(warps) for one in code),
        loaded=sum(32 * warps * one.width for one in code if one.opcode in ("LDG", "LDGSTS")),
    )


class _Warp:
    """One warp on its way through code."""

    def __init__(self) -> None:
        self.now, self.at = 0.0, 0  # cycle, and the instruction that comes next
        self.waits = False  # at a barrier
        self.ready: dict[str, float] = {}  # by register
        self.copies: list[float] = []  # when each group of asynchronous copies, and of HGMMA, is there
        self.products: list[float] = []


class Timeline:
    """Cycles of the warps that share one of an SM's four schedulers, of a program alone there: all four do the same.

    The scheduler issues an instruction a cycle, of the warp that can go on first.
    """

    def __init__(self, warps: int, device: Device) -> None:
        self.device, self.next = device, 0.0
        self.warps = [_Warp() for _ in range(max(1, warps // 4))]
        self.free: dict[str, float] = {}  # by unit

    @property
    def now(self) -> float:
        """When the last warp is through what has been run."""
        return max(warp.now for warp in self.warps)

    def run(self, code: Sequence[Instruction]) -> None:
        """Let all warps run a stretch of code."""
        for warp in self.warps:
            warp.at = 0
        while running := [warp for warp in self.warps if warp.at < len(code) and not warp.waits]:
            starts = [self._start(warp, code[warp.at]) for warp in running]
            first = min(range(len(running)), key=starts.__getitem__)
            self._issue(running[first], code[running[first].at], starts[first])

    def _start(self, warp: _Warp, one: Instruction) -> float:
        at = max([warp.now, self.next, *(warp.ready.get(name, 0.0) for name in one.sources)])
        if one.opcode == "DEPBAR":
            return max(at, _awaited(warp.copies, one.operands))
        if one.opcode == "WARPGROUP" and "DEPBAR" in one.modifiers:
            return max(at, _awaited(warp.products, one.operands))
        unit = "tensor" if one.opcode == "HMMA" else one.opcode
        return max(at, self.free.get(unit, 0.0)) if one.opcode == "HMMA" or one.opcode in NARROW else at

    def _issue(self, warp: _Warp, one: Instruction, at: float) -> None:
        done = at + LATENCIES.get(one.opcode, 5)
        match one.opcode:
            case "LDG" | "LD" | "ATOMG":
                done = at + self.device.latency
            case "LDGDEPBAR":
                warp.copies.append(at + self.device.latency)
            case "HGMMA":  # of four warps, one of each scheduler
                self.free["tensor"] = max(at, self.free.get("tensor", 0.0)) + one.tensor(4, self.device)
                if "gsb0" in one.operands:
                    warp.products.append(self.free["tensor"])
                done = at
            case "HMMA":  # of one warp, on a quarter of the SM's tensor cores
                self.free["tensor"] = at + one.tensor(4, self.device)
                done = self.free["tensor"] + 16
            case opcode if opcode in NARROW:
                self.free[opcode] = at + NARROW[opcode]
        warp.now = self.next = at + 1
        warp.at += 1
        for name in one.results:
            warp.ready[name] = done
        if one.opcode == "BAR":
            warp.waits = True
            if all(other.waits for other in self.warps):
                for other in self.warps:
                    other.waits, other.now = False, at + LATENCIES["BAR"]


def _awaited(groups: Sequence[float], operands: str) -> float:
    """When all groups but the last so many are there, the number of which ends the operands."""
    spared = int(operands.rsplit("0x", 1)[1], 16)
    return groups[-1 - spared] if len(groups) > spared else 0.0
