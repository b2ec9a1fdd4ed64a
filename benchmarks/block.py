"""What `kernels`, `gpu` and `predict` measure: one block, its shapes, its inputs, the providers, its lower bound.

A block is the plan part of one training step of a language model: `plan_projection` once, `add_plan` in every layer,
then backward from random gradients of every layer's output to logits, codebook, weight, bias and every layer's state.
Soft selection, temperature 1, no oracle.

The lower bound is the time that the block's compulsory work takes at the rates that this machine reaches. Matrix
products are bound by arithmetic and the additions by memory, and one does not hide the other: FLOPs at the rate of
large square matrix products + bytes at the rate of a large copy, both measured in the same run, with the same dtype and
threads. A copy's rate counts every byte twice, read and written.

Sizes: S sentences, K actions, A action-embedding size, L layers, D plan size (layers stacked), T tokens.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import timed
from planlm.corpus.offsets import segment_bounds
from planlm.kernels import StackedPlan, plan_projection
from planlm.precision import matrix_product_rate


@dataclass(frozen=True)
class Shape:
    """Sizes of a block, and what tables call it."""

    name: str
    num_sentences: int  # S
    num_actions: int  # K
    size: int  # A
    num_layers: int  # L
    width: int  # D / L
    num_tokens: int  # T

    @property
    def plan_size(self) -> int:
        """D."""
        return self.num_layers * self.width


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("gpt2", num_sentences=192, num_actions=1024, size=768, num_layers=10, width=768, num_tokens=4096),
        Shape("smollm2", num_sentences=192, num_actions=1024, size=384, num_layers=28, width=576, num_tokens=4096),
        Shape("large-K", num_sentences=512, num_actions=65536, size=384, num_layers=1, width=768, num_tokens=8192),
        Shape("long", num_sentences=4096, num_actions=1024, size=768, num_layers=1, width=768, num_tokens=131072),
    )
}
"""A batch of 32 windows of 128 tokens in two LMs; a codebook of 65,536 actions; 128 windows of 1,024 tokens."""


@dataclass(frozen=True)
class Block:
    """Inputs of a block and the upstream gradients of its outputs, all of one dtype and device."""

    shape: Shape
    logits: Tensor  # [S, K]
    codebook: Tensor  # [K, A]
    weight: Tensor  # [D, A]
    bias: Tensor  # [D]
    states: tuple[Tensor, ...]  # each layer's x, L times [T, D / L]
    segment_ids: Tensor  # int64 [T], sorted apart from -1
    segment_bounds: Tensor  # int32 [S + 1], as the collator gives them once a batch
    upstream: tuple[Tensor, ...]  # each layer's dy, L times [T, D / L]

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that get a gradient, by name."""
        plan = {"logits": self.logits, "codebook": self.codebook, "weight": self.weight, "bias": self.bias}
        return plan | {f"x[{layer}]": state for layer, state in enumerate(self.states)}

    def in_float64(self) -> Block:
        """The same numbers in float64, as leaves of their own."""

        def double(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(double, value))
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value.detach().double().requires_grad_(value.requires_grad)

        return Block(**{name: double(value) for name, value in vars(self).items()})


Provider = Callable[[Block], Sequence[Tensor]]
"""The forward of a block: every layer's output."""


def setup(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Block:
    """The one set-up behind correctness, speed, memory and predictions: the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        if device.type == "meta":  # nothing to draw, and meta tensors cannot be copied to
            return torch.empty(*size, dtype=dtype, device=device)
        return torch.randn(*size, generator=generator).mul_(scale).to(device, dtype)

    layers, state = range(shape.num_layers), (shape.num_tokens, shape.width)
    return Block(
        shape,
        logits=normal(shape.num_sentences, shape.num_actions, scale=2.0).requires_grad_(),
        codebook=normal(shape.num_actions, shape.size).requires_grad_(),
        weight=normal(shape.plan_size, shape.size, scale=shape.size**-0.5).requires_grad_(),
        bias=normal(shape.plan_size).requires_grad_(),
        states=tuple(normal(*state).requires_grad_() for _ in layers),
        segment_ids=(segment_ids := _segment_ids(shape, generator)).to(device),
        segment_bounds=segment_bounds(segment_ids.numpy(), shape.num_sentences).to(device),
        upstream=tuple(normal(*state) for _ in layers),
    )


def forward_backward(provider: Provider, block: Block) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
    """Every layer's output, and the gradients of `block.leaves()` in their order."""
    outputs = provider(block)
    return outputs, torch.autograd.grad(outputs, list(block.leaves().values()), block.upstream)


def token_level(block: Block) -> list[Tensor]:
    """The mixture as the method's authors compute it: for every token, and again in every layer, of scores / 1.0."""
    unplanned = (block.segment_ids < 0)[:, None]  # [T, 1]
    scores = block.logits.index_select(0, block.segment_ids.clamp(min=0))  # [T, K]
    outputs = []
    parameters = zip(block.weight.split(block.shape.width), block.bias.split(block.shape.width), strict=True)
    for state, (weight, bias) in zip(block.states, parameters, strict=True):
        plan = F.linear((scores / 1.0).softmax(dim=1) @ block.codebook, weight, bias)  # [T, D / L]
        outputs.append(state + plan.masked_fill_(unplanned, 0.0))
    return outputs


def strong_eager(block: Block) -> list[Tensor]:
    """The block in plain PyTorch as well as it goes: softmax and mixture once a sentence, one stacked projection.

    Kept is the fastest of what was tried on two cores, in float32 and bf16, on the shapes gpt2, smollm2 and long:
    index_select (F.embedding up to 45 % slower, indexing with ids 1.2 to 5 times slower), split (slices of the stacked
    plan 4 to 30 % slower: their backward fills and adds), adding the state in place (out of place 2 to 10 % slower),
    one projection (one a layer 20 to 90 % slower where there are several), a gather a layer (one gather of all layers,
    then split, 10 to 140 % slower). Padding with a row of zeros, for tokens without a plan, took as long as `cat`.
    """
    mixture = block.logits.softmax(dim=1) @ block.codebook  # [S, A]
    projected = F.linear(mixture, block.weight, block.bias)  # [S, D]
    padded = F.pad(projected, (0, 0, 1, 0))  # [1 + S, D]; the first row, of zeros, is that of id -1
    picks = block.segment_ids + 1
    plans = padded.split(block.shape.width, dim=1)
    return [plan.index_select(0, picks).add_(state) for state, plan in zip(block.states, plans, strict=True)]


def planlm(block: Block) -> list[Tensor]:
    """`planlm.kernels` with the backend that it chooses."""
    projected = plan_projection(block.logits, block.codebook, block.weight, block.bias).projected  # [S, D]
    plan = StackedPlan(projected, [block.shape.width] * block.shape.num_layers, block.segment_bounds)
    return [plan.add(layer, state, block.segment_ids) for layer, state in enumerate(block.states)]


PROVIDERS: dict[str, Provider] = {
    "token-level": token_level,
    "strong eager": strong_eager,
    "compiled": strong_eager,
    "planlm": planlm,
}


def providers(names: Sequence[str], device: torch.device) -> dict[str, Provider]:
    """The providers of these names that can run; `compiled` is compiled afresh, without the graphs of other shapes."""
    found = {name: PROVIDERS[name] for name in names}
    if "compiled" in found:
        if why_not_compiled(device):
            del found["compiled"]
        else:
            torch._dynamo.reset()
            found["compiled"] = torch.compile(strong_eager, fullgraph=True, dynamic=False)
    return found


def why_not_compiled(device: torch.device) -> str | None:
    """Why torch.compile cannot run on `device`; None where it can."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "torch.compile needs triton, which is not installed"
    if os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++"))):
        return None
    return "torch.compile needs a C++ compiler, and none was found; set CXX or install g++"


def _segment_ids(shape: Shape, generator: torch.Generator) -> Tensor:
    """Sentences of log-normal lengths, each of at least one token, with one token in 64 that has no plan."""
    num_planned = shape.num_tokens - shape.num_tokens // 64
    ends = torch.randn(shape.num_sentences, generator=generator).mul(0.6).exp().cumsum(0)
    spare = num_planned - shape.num_sentences
    ends = (ends / ends[-1] * spare).round().long() + torch.arange(1, shape.num_sentences + 1)
    planned = torch.randperm(shape.num_tokens, generator=generator)[:num_planned].sort().values
    ids = torch.full((shape.num_tokens,), -1)
    ids[planned] = torch.searchsorted(ends, torch.arange(num_planned), right=True)
    return ids


@dataclass(frozen=True)
class Work:
    """What a block cannot do without: floating-point operations, and bytes read or written."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Rates:
    """What a machine reaches: FLOP/s of matrix products in a dtype, and bytes per second of a copy."""

    flops: float
    bytes: float


def compulsory(shape: Shape, dtype: torch.dtype) -> Work:
    """The least work of a block, forward and backward.

    FLOPs of the forward: `2 (SKA + SAD)` for `(softmax @ codebook) @ weight.T`, or `2 (KAD + SKD)` for
    `softmax @ (codebook @ weight.T)` where that is less. Each of these products has two in the backward.

    Elements, each moved once:
        parameters: logits SK, codebook KA, weight DA, bias D
        forward:    reads the parameters and x TD; writes projected SD and y TD
        backward:   reads dy TD and the parameters without the bias; writes the gradients of the parameters
    The forward also reads the ids, int64. dx is dy itself and costs nothing; tensors of S x A are left out.
    """
    s, k, a, d, t = shape.num_sentences, shape.num_actions, shape.size, shape.plan_size, shape.num_tokens
    products = min(s * k * a + s * a * d, k * a * d + s * k * d)
    parameters = s * k + k * a + d * a + d
    forward = parameters + t * d + s * d + t * d
    backward = t * d + (parameters - d) + parameters
    return Work(flops=3 * 2 * products, bytes=dtype.itemsize * (forward + backward) + 8 * t)


def measure_rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """The best of a few square matrix products of two sizes, and of a few copies far beyond every cache."""
    sizes, copied_bytes = ((4096, 8192), 2**30) if device.type == "cuda" else ((2048, 4096), 2**28)
    source = torch.ones(copied_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    copies = [2 * copied_bytes / timed(functools.partial(target.copy_, source), device)[0] for _ in range(7)]
    return Rates(flops=max(matrix_product_rate(dtype, device, size) for size in sizes), bytes=max(copies))
