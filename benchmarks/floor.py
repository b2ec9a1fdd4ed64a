"""The floor: the time that the block's compulsory work takes at the rates that this machine reaches.

Matrix products are bound by arithmetic and the additions by memory, and one does not hide the other: floor = FLOPs at
the rate of large square matrix products + bytes at the rate of a large copy, both measured in the same run, with the
same dtype and threads. A copy's rate counts every byte twice, read and written.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from benchmarks.blocks import Shape
from benchmarks.clock import timed
from planlm.training.flops import matrix_product_rate

INDEX_BYTES = 8
"""Segment ids are int64."""


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

    def floor(self, work: Work) -> float:
        """Seconds that the work takes, products and then bytes."""
        return work.flops / self.flops + work.bytes / self.bytes

    def roofline(self, work: Work) -> float:
        """Seconds that the work takes where the shorter of the two hides behind the longer."""
        return max(work.flops / self.flops, work.bytes / self.bytes)


def compulsory(shape: Shape, dtype: torch.dtype) -> Work:
    """The least work of a block, forward and backward.

    FLOPs of the forward: `2 (SKA + SAD)` for `(softmax @ codebook) @ weight.T`, or `2 (KAD + SKD)` for
    `softmax @ (codebook @ weight.T)` where that is less. Each of these products has two in the backward.

    Elements, each moved once:
        parameters: logits SK, codebook KA, weight DA, bias D
        forward:    reads the parameters and x TD; writes projected SD and y TD
        backward:   reads dy TD and the parameters without the bias; writes the gradients of the parameters
    The forward also reads the ids. dx is dy itself and costs nothing; tensors of S x A are left out.
    """
    s, k, a, d, t = shape.num_sentences, shape.num_actions, shape.size, shape.plan_size, shape.num_tokens
    products = min(s * k * a + s * a * d, k * a * d + s * k * d)
    parameters = s * k + k * a + d * a + d
    forward = parameters + t * d + s * d + t * d
    backward = t * d + (parameters - d) + parameters
    return Work(flops=3 * 2 * products, bytes=dtype.itemsize * (forward + backward) + INDEX_BYTES * t)


def measure_rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """The best of a few square matrix products of two sizes, and of a few copies far beyond every cache."""
    sizes, copied_bytes = ((4096, 8192), 2**30) if device.type == "cuda" else ((2048, 4096), 2**28)
    source = torch.ones(copied_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    copies = [2 * copied_bytes / timed(functools.partial(target.copy_, source), device)[0] for _ in range(7)]
    return Rates(flops=max(matrix_product_rate(dtype, device, size) for size in sizes), bytes=max(copies))
