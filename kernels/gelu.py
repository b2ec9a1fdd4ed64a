"""GELU in its tanh form: what lies between the two matrix products of a feed-forward layer of GPT-2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import choose


def gelu(x: Tensor) -> Tensor:
    """`x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))` of each element (arXiv:1606.08415).

    On a CPU with one exponential in C++ where that is to be had, for float32 and bf16; elsewhere torch's. Keeps `x` for
    the backward pass. Differentiable once.

    Args:
        x (Tensor): any shape.

    Returns:
        Tensor: of the shape and dtype of `x`.
    """
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous():
        backend = choose("gelu", x.device, torch.float32)
        if backend is not None and backend.name == "cpp":
            out: Tensor = torch.ops.planlm.gelu(x)
            return out
    return F.gelu(x, approximate="tanh")
