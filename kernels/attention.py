"""Causal attention within each of the documents that share a sequence: what packing needs of an LM.

Sizes: B sequences, W positions, H query heads, G key heads (H a multiple of G), d channels of a head.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import choose, constant
from .cpp import fast_bf16


def packed_attention(query: Tensor, key: Tensor, value: Tensor, first: Tensor, scale: float) -> Tensor:
    """`softmax(scale * q k^T) v` over the keys from `first[t]` to `t` of each position `t`.

    On a CPU with bf16 products, and for bf16, a kernel of PlanLM (FlashAttention-2, arXiv:2307.08691) that only
    touches what is visible; elsewhere torch's attention with a mask. Differentiable in query, key and value, once.

    Args:
        query (Tensor): `[B, W, H, d]`.
        key (Tensor): `[B, W, G, d]`.
        value (Tensor): `[B, W, G, d]`.
        first (Tensor): int64 `[B, W]`, where the document of each position begins in its sequence.
        scale (float): of the scores.

    Returns:
        Tensor: `[B, W, H, d]`.

    Raises:
        ValueError: `first` falls along a sequence or lies behind its own position.
    """
    if _fits(query, key, value):
        dense = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value)]
        out: Tensor = torch.ops.planlm.packed_attention(*dense, first, scale)[0]
        return out
    at = torch.arange(query.shape[1], device=query.device)
    seen = (at <= at[:, None]) & (at >= first[:, :, None])  # [B, W, W]
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=seen[:, None],
        scale=scale,
        enable_gqa=bool(query.shape[2] != key.shape[2]),  # tracing makes a tensor of it
    )
    return mixed.transpose(1, 2)


def has_packed_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `packed_attention` has a kernel of its own for this device and dtype."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    backend = choose("packed_attention", device, torch.float32)
    return backend is not None and backend.name == "cpp" and _products()


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    even = query.shape[1] % 2 == 0 and query.shape[3] % 2 == 0 and query.numel() > 0
    return even and query.dtype == key.dtype == value.dtype and has_packed_attention(query.device, query.dtype)


@constant
def _products() -> bool:
    return _probe()


@functools.cache
def _probe() -> bool:
    """Whether oneDNN makes bf16 products here: the processor, or its settings, may not let it."""
    if not torch.backends.mkldnn.enabled or not fast_bf16():
        return False
    one = torch.zeros(1, 2, 1, 2, dtype=torch.bfloat16)
    try:
        torch.ops.planlm.packed_attention(one, one, one, torch.zeros(1, 2, dtype=torch.int64), 1.0)
    except RuntimeError:
        return False
    return True
