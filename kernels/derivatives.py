"""Second derivatives are refused, in the same words on every backend.

The fast backends write first derivatives out by hand, so a derivative of those would silently lack terms. Every
differentiable input passes through here, which costs nothing and saves nothing.
"""

from __future__ import annotations

from typing import Any, NoReturn, overload

import torch
from torch import Tensor


@overload
def first_derivative_only(tensor: Tensor) -> Tensor: ...
@overload
def first_derivative_only(tensor: Tensor | None) -> Tensor | None: ...
def first_derivative_only(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself, such that differentiating its gradient raises a RuntimeError."""
    if tensor is None or not tensor.requires_grad:
        return tensor
    return _FirstDerivativeOnly.apply(tensor)  # type: ignore[no-untyped-call]


def once(gradient: Tensor) -> Tensor:
    """The gradient itself, such that differentiating it raises a RuntimeError."""
    refused: Tensor = _Refused.apply(gradient)  # type: ignore[no-untyped-call]
    return refused


class _FirstDerivativeOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return once(gradient)


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        refuse()


def refuse(*_: Any) -> NoReturn:
    """The backward of every gradient."""
    raise RuntimeError(
        "planlm.kernels has first derivatives only, and a second one was asked for; "
        "leave create_graph off for losses that go through these operations"
    )
