"""Second derivatives are refused, in the same words on every backend.

The fast backends write first derivatives out by hand, so a derivative of those would silently lack terms.
"""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def first_derivative_only(value: T) -> T:
    """The value itself; of a tensor with a gradient such that differentiating that gradient raises a RuntimeError."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return value
    return _FirstDerivativeOnly.apply(value)  # type: ignore[no-any-return, no-untyped-call]


def once(gradient: Tensor, *sources: Tensor | None) -> Tensor:
    """The gradient itself, such that differentiating it, or with respect to `sources`, raises a RuntimeError."""
    return _Refused.apply(gradient, *sources)  # type: ignore[no-any-return, no-untyped-call]


class _FirstDerivativeOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *_: Tensor | None) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return once(gradient)


class _Refused(_FirstDerivativeOnly):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        refuse()


def refuse(*_: Any) -> NoReturn:
    """The backward of every gradient."""
    raise RuntimeError(
        "planlm.kernels has first derivatives only, and a second one was asked for; "
        "leave create_graph off for losses that go through these operations"
    )
