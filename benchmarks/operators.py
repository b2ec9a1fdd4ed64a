"""The kernels that CUDA runs for PyTorch code, counted on tensors without data (`meta`).

torch's operators are seen by a dispatch mode, PlanLM's launches by the Triton backend's own observer. A kernel reads
the distinct elements of its inputs once and writes its results once; views and allocations are free. Of torch's
operators only those below are more than one kernel, each rule in torch's favour: an `index_add_` costs no more than
reading its source and its target and writing the target, a softmax reads once whatever its width, a product needs no
workspace, the gradient of an embedding no sort.

Two things `meta` does not have and CUDA does are pretended: autocast to bf16, by the lists of torch's documentation,
and `scaled_dot_product_attention` by one kernel. Both are seen by a function mode.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from planlm.training.counted import FREE, GATHERS, bytes_of, tensors_of

if TYPE_CHECKING:
    from planlm.kernels.triton_launch import Launch

FILLS = {"zeros", "zeros_like", "new_zeros", "zero_", "fill_", "ones", "ones_like", "full", "full_like", "new_full"}
"""Operators that only write."""

PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
"""Where matrix products have their factors; a bias is added as the result is written."""

LOWER = {
    F.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, Tensor.matmul, Tensor.mm, Tensor.bmm,
    Tensor.addmm, Tensor.__matmul__, F.scaled_dot_product_attention,
}  # fmt: skip
"""What autocast runs in bf16."""

FULL = {
    F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, Tensor.log_softmax, F.cross_entropy,
    torch.sum, Tensor.sum, torch.exp, Tensor.exp, torch.log, Tensor.log, torch.rsqrt, Tensor.rsqrt, torch.pow,
    Tensor.pow, Tensor.__pow__, torch.cumsum, Tensor.cumsum, torch.norm, Tensor.norm,
}  # fmt: skip
"""What autocast runs in float32."""


@dataclass(frozen=True)
class Part:
    """Memory that a kernel touches: so many bytes of a storage from an offset on."""

    storage: int
    begin: int
    bytes: int


@dataclass(frozen=True)
class Product:
    """A matrix product of the library's: `batch` times `[m, k] @ [k, n]`."""

    batch: int
    m: int
    n: int
    k: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Kernel:
    """One kernel, or several launches of one, as counted."""

    name: str
    reads: tuple[Part, ...] = ()
    writes: tuple[Part, ...] = ()
    product: Product | None = None
    attention: str = ""  # of `ATTENTION` in `estimates`, with "forward" or "backward"
    flops: int = 0
    launch: Launch | None = None  # of one of PlanLM's
    launches: int = 1
    phase: str = "forward"

    @property
    def bytes(self) -> int:
        """Everything read and written once."""
        return sum(part.bytes for part in (*self.reads, *self.writes))


@contextlib.contextmanager
def counted(tables: int = 90) -> Iterator[Counter]:
    """Collect the kernels of the block, PlanLM's by its Triton backend with the tiles of an architecture."""
    from planlm.kernels import use_backend
    from planlm.kernels.triton_launch import observed

    counter = Counter()
    with observed(counter.of_triton, architecture=tables), use_backend("triton"), counter:
        yield counter


class Counter(TorchDispatchMode):
    """Collects kernels in order."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.phase = "forward"
        self._storages: list[Any] = []  # kept, so that no two have one identity

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for kernel in self._of_operator(function, args, kwargs or {}, result):
            self.add(**kernel)
        return result

    def add(self, name: str, reads: Any = (), writes: Any = (), **work: Any) -> None:
        """Note a kernel. `reads` and `writes` hold tensors, or with one the bytes of it that count, or bytes alone."""
        touched = {"reads": tuple(map(self._part, reads)), "writes": tuple(map(self._part, writes))}
        self.kernels.append(Kernel(name, **touched, **work, phase=self.phase))

    def of_triton(self, launch: Launch) -> bool:
        """Note a launch of the Triton backend and do not run it."""
        from benchmarks.programs import GATHERED

        name = launch.kernel.__name__.removesuffix("_kernel")
        rows = {
            id(launch.arguments[matrix]): launch.arguments[count]
            for (own, matrix), count in GATHERED.items()
            if own == name and matrix in launch.arguments
        }
        reads = [
            (item, bytes_of(item[: rows[id(item)]])) if isinstance(item, Tensor) and id(item) in rows else item
            for item in launch.reads
        ]
        self.add(name, reads, launch.writes, launch=launch)
        return False

    def _part(self, item: Tensor | tuple[Tensor, int] | int) -> Part:
        if isinstance(item, int):  # of rows somewhere, as launches give them: nobody else's memory
            self._storages.append(None)
            return Part(-len(self._storages), 0, item)
        tensor, size = item if isinstance(item, tuple) else (item, bytes_of(item))
        storage = tensor.untyped_storage()
        self._storages.append(storage)
        return Part(storage._cdata, tensor.storage_offset() * tensor.itemsize, size)

    def _of_operator(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Iterator[dict[str, Any]]:
        """The kernels that CUDA runs for one of torch's operators, as arguments of `add`."""
        name = function._schema.name.rpartition("::")[2]
        reads, writes = tensors_of((args, kwargs)), tensors_of(result)
        if name in FREE or function.is_view or not sum(map(bytes_of, writes)):
            return
        match name:
            case _ if name in PRODUCTS:
                left, right = (args[index] for index in PRODUCTS[name])
                *batch, m, k = left.shape
                product = Product(math.prod(batch), m, right.shape[-1], k, left.dtype)
                yield {"name": name, "reads": reads, "writes": writes, "product": product}
            case "_flash_attention_forward":  # causal, documents as long as the longest
                work = {"attention": "flash forward", "flops": 2 * args[0].numel() * args[6]}
                yield {"name": "attention", "reads": reads, "writes": writes, **work}
            case "_flash_attention_backward":
                work = {"attention": "flash backward", "flops": 5 * args[1].numel() * args[9]}
                yield {"name": "attention backward", "reads": reads, "writes": writes, **work}
            case _ if name in FILLS:
                yield {"name": "fill", "writes": writes}
            case _ if name in GATHERS:
                size = min(bytes_of(reads[0]), bytes_of(writes[0]))
                yield {"name": name, "reads": [(reads[0], size), *reads[1:]], "writes": writes}
            case "copy_":
                yield {"name": "copy", "reads": [args[1]], "writes": writes}
            case "_to_copy" | "clone":
                yield {"name": "copy", "reads": reads, "writes": writes}
            case "constant_pad_nd" if max(args[1]) <= 0:  # cuts off
                yield {"name": "copy", "reads": [(reads[0], bytes_of(writes[0]))], "writes": writes}
            case "constant_pad_nd" | "select_backward" | "slice_backward" | "embedding_dense_backward":
                yield {"name": f"{name}: fill", "writes": writes}
                size = min(bytes_of(reads[0]), bytes_of(writes[0]))
                yield {"name": name, "reads": reads, "writes": [(writes[0], size)]}
            case "_softmax_backward_data":  # torch multiplies the gradient with the probabilities first
                product = torch.empty_like(args[0])
                yield {"name": f"{name}: mul", "reads": args[:2], "writes": [product]}
                yield {"name": name, "reads": [product, args[1]], "writes": writes}
            case "nll_loss_forward":
                yield {"name": name, "reads": [(reads[0], 4 * args[1].numel()), *reads[1:]], "writes": writes}
            case "nll_loss_backward":
                yield {"name": f"{name}: fill", "writes": writes}
                size = 4 * args[2].numel()
                yield {"name": name, "reads": [args[0], args[2]], "writes": [(writes[0], size)]}
            case "native_layer_norm_backward":
                yield {"name": name, "reads": reads, "writes": writes[:1]}
                if writes[1:]:
                    yield {"name": f"{name}: weights", "reads": reads[:2], "writes": writes[1:]}
            case _:
                yield {"name": name, "reads": reads, "writes": writes}


# What CUDA has and `meta` has not


class Pretended(TorchFunctionMode):
    """Autocast to bf16, and attention by one kernel.

    Args:
        counter: notes attention's kernels.
        autocast: whether to cast, as CUDA's autocast does.
    """

    def __init__(self, counter: Counter, autocast: bool = True) -> None:
        super().__init__()
        self.counter, self.on = counter, autocast
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Pretended:
        on_meta: list[tuple[Any, str, Callable[..., Any]]] = [
            (torch, "is_autocast_enabled", lambda *_: self.on),
            (torch, "get_autocast_dtype", lambda *_: torch.bfloat16),
            (torch, "autocast", lambda *_, enabled: contextlib.nullcontext() if enabled else self.without()),
            (torch.amp, "is_autocast_available", lambda *_: True),
        ]
        for module, name, fake in on_meta:
            self._patches.enter_context(mock.patch.object(module, name, _for_meta(fake, getattr(module, name))))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()
        self._casts.clear()

    @contextlib.contextmanager
    def without(self) -> Iterator[None]:
        """As `torch.autocast(enabled=False)`."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.on and "out" not in kwargs and function in LOWER:
            args, kwargs = tree_map(self._lower, (args, kwargs))
        elif self.on and function in FULL:
            args, kwargs = tree_map(lambda leaf: leaf.float() if _is(leaf, torch.bfloat16) else leaf, (args, kwargs))
        if function is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return function(*args, **kwargs)

    def _lower(self, leaf: Any) -> Any:
        if not _is(leaf, torch.float32):
            return leaf
        if not (leaf.is_leaf and leaf.requires_grad):
            return leaf.to(torch.bfloat16)
        if id(leaf) not in self._casts:  # weights are cast once
            self._casts[id(leaf)] = leaf, leaf.to(torch.bfloat16)
        return self._casts[id(leaf)][1]

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **kwargs: Any
    ) -> Tensor:
        flops, kind = 4 * query.numel() * key.shape[2], "flash"
        if attn_mask is not None:  # memory-efficient attention, which computes what the mask then hides
            kind = "efficient"
            if attn_mask.dtype == torch.bool:
                self.counter.add("mask to bias", [attn_mask], [attn_mask.new_empty(attn_mask.shape, dtype=query.dtype)])
        elif kwargs.get("is_causal"):
            flops //= 2
        mixed: Tensor = _Attention.apply(self.counter, kind, flops, query, key, value)
        return mixed


class _Attention(torch.autograd.Function):
    """Notes attention's two kernels; five products backward, two forward."""

    @staticmethod
    def forward(ctx: Any, counter: Counter, kind: str, flops: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = _as_stored(query)
        counter.add("attention", [query, key, value], [out], attention=f"{kind} forward", flops=flops)
        ctx.save_for_backward(query, key, value, out)
        ctx.work = counter, kind, flops
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        counter, kind, flops = ctx.work
        query, key, value, out = ctx.saved_tensors
        gradients = [_as_stored(tensor) for tensor in (query, key, value)]
        reads = [query, key, value, out, upstream]
        work = {"attention": f"{kind} backward", "flops": 5 * flops // 2}
        counter.add("attention backward", reads, gradients, **work)
        return None, None, None, *gradients


def _as_stored(heads: Tensor) -> Tensor:
    """A new `[B, H, W, d]` that lies in memory as `[B, W, H, d]`."""
    batch, number, width, size = heads.shape
    return heads.new_empty(batch, width, number, size).transpose(1, 2)


def _for_meta(fake: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """`fake` where the first argument is "meta", elsewhere `real`."""
    return lambda *args, **kwargs: (fake if args[:1] == ("meta",) else real)(*args, **kwargs)


def _is(leaf: Any, dtype: torch.dtype) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == dtype


def count_update(counter: Counter, parameters: list[nn.Parameter]) -> None:
    """Clipping of the gradients' norm and a step of torch's fused AdamW.

    Launches hold 320 blocks of 65,536 elements, as torch's multi-tensor kernels do.
    """
    counter.phase = "update"
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    moments = [torch.empty_like(gradient) for gradient in gradients for _ in range(2)]
    weights = [parameter for parameter in parameters if parameter.grad is not None]
    launches = -(-sum(-(-gradient.numel() // 65536) for gradient in gradients) // 320)
    counter.add("norm of gradients", gradients, [gradients[0].new_empty(len(gradients))], launches=launches + 2)
    counter.add("clip", gradients, gradients, launches=launches)
    state = [*weights, *moments]
    counter.add("fused AdamW", [*gradients, *state], state, launches=launches)
