"""Llama's parts as CUDA has them, for those who count on another device what a step asks of one.

Each of their kernels is an operator there, which reads and writes what the kernel does and computes nothing: modes that
count operators see it, on the CPU and on `meta`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from planlm.speedups import llama


@contextlib.contextmanager
def parts_as_on_cuda() -> Iterator[None]:
    """Within it the parts of an LM that training on CUDA has fused are counted so; what they return has no values."""
    before, llama.stand_in = llama.stand_in, _Counted
    try:
        yield
    finally:
        llama.stand_in = before


def _write(reads: list[Tensor], like: list[int]) -> list[Tensor]:
    """Tensors of the shapes of some of those that are read."""
    return [torch.zeros_like(reads[index]) for index in like]


def _kernel(name: str) -> Any:
    operator = torch.library.custom_op(f"planlm::{name}", _write, mutates_args=())
    operator.register_fake(_write)
    return operator


_norm, _gate, _rotate = (_kernel(name) for name in ("llama_norm", "llama_gate", "llama_rotation"))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, _: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        found: Tensor = _norm([x, weight], [0])[0]
        return found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        reads, wanted = [upstream, *ctx.saved_tensors], enumerate(ctx.needs_input_grad[:2], 1)
        return *(_norm(reads, [index])[0] if is_wanted else None for index, is_wanted in wanted), None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        found: Tensor = _gate([a, b], [0])[0]
        return found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(_gate([upstream, *ctx.saved_tensors], [1, 2]))


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return tuple(_rotate([q, k, cos, sin], [0, 1]))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_rotate([*upstream, *ctx.saved_tensors], [0, 1]), None, None


class _Counted:
    """What `llama` asks for the parts."""

    norm, gate, rotate = _Norm.apply, _Gate.apply, _Rotation.apply
