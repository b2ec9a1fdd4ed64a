"""`python -m benchmarks.traffic`: bytes moved and kernels launched on CUDA by one block, counted without a GPU.

Everything runs on tensors without data. torch's operators are seen by a dispatch mode, Triton's launches by the
backend's own observer. Each kernel reads every element of its inputs once and writes its outputs once; views and
allocations are free. Of torch's operators only those below are more than one kernel, each rule in torch's favour: an
`index_add_` costs no more than reading its source and its target and writing the target, a softmax reads once whatever
its width, a product needs no workspace and no split. `compiled` is missing: what inductor fuses is not known without a
GPU.

Times are predictions, in bf16: of each kernel the longer of its bytes and its FLOPs at the rates of one H100, plus a
stated cost a launch, summed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import block as blocks
from benchmarks import harness
from benchmarks.block import SHAPES, Block, Provider, Shape
from benchmarks.kernels import KernelRow
from planlm.errors import InputError
from planlm.files import write_text
from planlm.kernels import use_backend
from planlm.report.tables import align

if TYPE_CHECKING:
    from planlm.kernels.triton_tiles import Launch

H100 = blocks.Rates(flops=798e12, bytes=3.0e12)
"""Measured on one H100 80GB HBM3: a bf16 product of 8192³, and a copy, bytes read and written."""

LAUNCH_SECONDS = 3e-6
"""What a launch costs beside its work: an assumption, about the gap between dependent kernels of one stream."""

ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach")
"""Operators that launch nothing, apart from views."""

FILLS = ("zeros", "zeros_like", "new_zeros", "zero_", "fill_", "ones_like", "full", "full_like", "new_full")
"""Operators that only write."""

PRODUCTS = {
    "mixture_fwd_kernel": (("num_sentences", "size", "num_actions", "logits", "codebook", "means"),),
    "projection_fwd_kernel": (("num_sentences", "plan_size", "size", "mixture", "weight", "projected"),),
    "projection_bwd_kernel": (
        ("num_sentences", "size", "plan_size", "grad_projected", "weight", "grad_mixture"),
        ("plan_size", "size", "num_sentences", "grad_projected", "mixture", "grad_weight"),
    ),
    "mixture_bwd_kernel": (
        ("num_actions", "size", "num_sentences", "logits", "grad_mixture", "grad_codebook"),
        ("num_sentences", "num_actions", "size", "grad_mixture", "codebook", "grad_logits"),
    ),
}
"""Of the products in Triton's kernels, the arguments that are their sizes m, n and d, operands and result."""

THRESHOLDS = {"compulsory": 1.5, "strong eager": 0.7, "token-level": 0.1}
"""Limits of PlanLM's bytes over others'."""

LAUNCHES_THRESHOLD = 0.5
"""PlanLM's launches over strong eager's have to be below this."""


@dataclass(frozen=True)
class Kernel:
    """One launch: PlanLM's kernel or torch's operator."""

    name: str
    bytes: int  # every tensor once
    flops: int = 0  # of matrix products
    tile_reads: int = 0  # bytes that the programs of a Triton product ask for: what is beyond `bytes` comes from L2
    triton: bool = False  # one of PlanLM's own


class Counter(TorchDispatchMode):
    """Collects the kernels that torch's operators launch; PlanLM's are taken apart by running their Triton side."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.namespace == "planlm":
            with self:
                return _triton_side(function)(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        self.kernels += _of_operator(function, args, kwargs or {}, result)
        return result

    def of_triton(self, launch: Launch) -> bool:
        """Note a launch of the Triton backend and do not run it."""
        products = list(_products(launch))
        moved = sum(map(_bytes, (*launch.reads, *launch.writes)))
        tile_reads = sum(
            left.itemsize * m * d * -(-n // launch.tiles.columns) + right.itemsize * d * n * -(-m // launch.tiles.rows)
            for m, n, d, left, right in products
        )
        flops = sum(2 * m * n * d for m, n, d, *_ in products)
        name = launch.kernel.__name__.removesuffix("_kernel")
        self.kernels.append(Kernel(name, moved, flops, tile_reads, triton=True))
        return False


def count(provider: Provider, block: Block) -> list[Kernel]:
    """Kernels of one forward and backward.

    Args:
        provider (Provider): the block's forward.
        block (Block): inputs on the meta device.
    """
    from planlm.kernels.triton_tiles import observed

    counter = Counter()
    with observed(counter.of_triton, architecture=90), counter:
        blocks.forward_backward(provider, block)
    return counter.kernels


def planlm_on_triton(block: Block) -> list[Tensor]:
    """What `planlm.kernels` runs on CUDA."""
    with use_backend("triton"):
        return list(blocks.planlm(block))


_ASSUMPTIONS = (
    f"{H100.bytes / 1e12:g} TB/s, {H100.flops / 1e12:g} TFLOP/s in bf16, {1e6 * LAUNCH_SECONDS:g} µs a launch"
)

PROVIDERS: dict[str, Provider] = {
    "token-level": blocks.token_level,
    "strong eager": blocks.strong_eager,
    "planlm": planlm_on_triton,
}


@dataclass(frozen=True)
class Traffic:
    """What one provider moves and launches on a shape in a dtype; `predicted` is in seconds, None in float32."""

    shape: str
    dtype: str
    provider: str
    compulsory: int
    bytes: int
    launches: int
    tile_reads: int
    predicted: float | None
    kernels: list[Kernel]


def traffic(shape: Shape, dtype: str) -> list[Traffic]:
    """Count every provider on one shape."""
    block = blocks.setup(shape, harness.DTYPES[dtype], torch.device("meta"))
    least = blocks.compulsory(shape, harness.DTYPES[dtype]).bytes
    found = []
    for name, provider in PROVIDERS.items():
        kernels = count(provider, block)
        sums = (sum(kernel.bytes for kernel in kernels), len(kernels), sum(kernel.tile_reads for kernel in kernels))
        time = predicted(kernels) if dtype == "bf16" else None
        found.append(Traffic(shape.name, dtype, name, least, *sums, time, kernels))
    return found


def predicted(kernels: Sequence[Kernel]) -> float:
    """Seconds on one H100 in bf16: see the top of the file."""
    return sum(max(kernel.bytes / H100.bytes, kernel.flops / H100.flops) + LAUNCH_SECONDS for kernel in kernels)


def predictions(rows: Sequence[KernelRow]) -> str:
    """Predicted and measured time of bf16 rows that `benchmarks.gpu` measured."""
    lines = [f"Predicted for one H100 ({_ASSUMPTIONS}), and measured on this device:"]
    for row in rows:
        if row.status == "ok" and row.dtype == "bf16" and row.provider in PROVIDERS:
            block = blocks.setup(SHAPES[row.shape], torch.bfloat16, torch.device("meta"))
            expected = predicted(count(PROVIDERS[row.provider], block))
            lines.append(
                f"{row.shape} {row.dtype}: {row.provider}: predicted {1e6 * expected:,.0f} µs, "
                f"measured {1e6 * row.median:,.0f} µs, {row.median / expected:.2f} times as long"
            )
    return "\n".join(lines)


def table(found: Sequence[Traffic], parts: bool) -> str:
    """One line a provider; with `parts` its kernels below it, those of one name together."""
    cells: list[Sequence[str]] = [("", "launches", "MB", "of least", "of strong", "of token", "H100 µs", "tiles MB")]
    by_name = {one.provider: one for one in found}
    for one in found:
        over = (by_name[name].bytes for name in ("strong eager", "token-level"))
        cells.append(
            (
                one.provider,
                str(one.launches),
                f"{one.bytes / 1e6:,.1f}",
                f"{one.bytes / one.compulsory:.2f}",
                *(f"{one.bytes / other:.3f}" for other in over),
                "–" if one.predicted is None else f"{1e6 * one.predicted:,.0f}",
                f"{one.tile_reads / 1e6:,.1f}" if one.tile_reads else "–",
            )
        )
        names: dict[str, list[Kernel]] = defaultdict(list)
        for kernel in one.kernels if parts else ():
            names[kernel.name].append(kernel)
        for name, own in names.items():
            cells.append(
                (f"  {name}", str(len(own)), f"{sum(k.bytes for k in own) / 1e6:,.1f}", *("" for _ in range(5)))
            )
    first = found[0]
    return f"{first.shape} {first.dtype}: at least {first.compulsory / 1e6:,.1f} MB\n{align(cells, left=(0,))}"


def judged(found: Sequence[Traffic]) -> Iterator[tuple[bool, str]]:
    """Every threshold on one shape: whether it passes, and a line that says so."""
    by_name = {one.provider: one for one in found}
    ours, case = by_name["planlm"], f"{found[0].shape} {found[0].dtype}"
    for other, limit in THRESHOLDS.items():
        base = ours.compulsory if other == "compulsory" else by_name[other].bytes
        least = "" if other == "compulsory" else f" (compulsory bytes alone are {ours.compulsory / base:.3f})"
        text = f"{case}: bytes {ours.bytes / base:.3f} × {other}, at most {limit:g}{least}"
        yield harness.verdict(ours.bytes <= limit * base, text)
    value, limit = ours.launches / by_name["strong eager"].launches, LAUNCHES_THRESHOLD
    yield harness.verdict(value < limit, f"{case}: launches {value:.3f} × strong eager, below {limit:g}")


@harness.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 (a threshold missed), 2 (bad usage)."""
    parser = harness.parser_of("traffic", __doc__)
    harness.add_names(parser, "shapes", SHAPES, default=["gpt2", "large-K", "long"])
    harness.add_names(parser, "dtypes", harness.DTYPES, default=["bf16", "float32"])
    parser.add_argument("--parts", action="store_true", help="list every provider's kernels")
    harness.add_file(parser, "json", "write what was counted, kernel by kernel")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        raise InputError("counting PlanLM's launches needs triton: pip install triton")
    cases = [traffic(SHAPES[shape], dtype) for shape in options.shapes for dtype in options.dtypes]
    print(f"One block, forward and backward, on CUDA (sm_90). H100 µs are predictions: {_ASSUMPTIONS}.")
    print("Tiles: what the programs of PlanLM's products ask for; beyond the bytes counted it has to come from L2.\n")
    print("\n\n".join(table(found, options.parts) for found in cases), end="\n\n")
    if options.json:
        write_text(options.json, json.dumps([asdict(one) for found in cases for one in found], indent=1) + "\n")
    return harness.print_verdicts(verdict for found in cases for verdict in judged(found))


def _triton_side(function: Any) -> Any:
    """The Triton backend's implementation of an operator `planlm::name`."""
    from planlm.kernels import triton_addition, triton_projection

    name = function._schema.name.removeprefix("planlm::")
    module = triton_addition if name in triton_addition.OPERATORS else triton_projection
    return getattr(module, name)


def _of_operator(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Iterator[Kernel]:
    """The kernels that CUDA runs for one of torch's operators."""
    name = function._schema.name.removeprefix("aten::")
    if name in ALLOCATIONS or function.is_view:
        return
    reads, writes = (
        sum(_bytes(tensor) for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor))
        for tensors in ((args, kwargs), result)
    )
    if writes == 0:
        return
    formula = flop_registry.get(function.overloadpacket)
    flops = formula(*args, **kwargs, out_val=result) if formula else 0
    match name:
        case "constant_pad_nd" if max(args[1]) <= 0:  # cuts off
            yield Kernel(name, 2 * writes)
        case "constant_pad_nd":  # the whole result is filled, then the input copied into it
            yield Kernel("constant_pad_nd: fill", writes)
            yield Kernel("constant_pad_nd: copy", 2 * reads)
        case "copy_":
            yield Kernel(name, _bytes(args[1]) + writes)
        case _ if name in FILLS:
            yield Kernel(name, writes)
        case "select_backward" | "slice_backward":  # zeros, then a copy of the gradient
            yield Kernel(f"{name}: fill", writes)
            yield Kernel(f"{name}: copy", 2 * reads)
        case _:
            yield Kernel(name, reads + writes, flops)


def _products(launch: Launch) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
    """m, n and d of a Triton launch's products `[m, d] @ [d, n]`, as its tiles divide them, with their operands."""
    for names in PRODUCTS.get(launch.kernel.__name__, ()):
        m, n, d, left, right, result = (launch.arguments[name] for name in names)
        if left is not None and right is not None and result is not None:
            yield m, n, d, left, right


def _bytes(item: Tensor | int) -> int:
    """Bytes of a tensor's distinct elements: an expanded dimension counts once."""
    if isinstance(item, int):
        return item
    elements = 1
    for size, stride in zip(item.shape, item.stride(), strict=True):
        elements *= size if stride != 0 or size == 0 else 1
    return elements * item.itemsize


if __name__ == "__main__":
    sys.exit(main())
