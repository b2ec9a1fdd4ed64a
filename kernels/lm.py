"""What the LM around the plan spends its time on besides matrix products: attention and the loss.

Attention is causal and within each of the documents that share a sequence: what packing needs. The cross-entropy turns
the logits into their own gradient.

Sizes: B sequences, W positions, H query heads, G key heads (H a multiple of G), d channels of a head, N rows of logits,
V columns.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import choose, constant
from .cpp import fast_bf16, logger

TAKEN = {"triton": (torch.float32, torch.bfloat16, torch.float16), "cpp": (torch.float32, torch.bfloat16)}
"""Dtypes of logits that a backend has an implementation for; the eager formula has the others."""


class Documents(NamedTuple):
    """Documents side by side in all positions of a batch, row after row, for `varlen_attention`.

    Attributes:
        offsets: int32 `[N + 1]`, the first position of each, and the end; equal ones enclose nothing.
        longest: positions of the longest, or more.
    """

    offsets: Tensor
    longest: int


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


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, window: int | None = None
) -> Tensor:
    """What `packed_attention` computes, by torch's flash attention over `documents`, without a mask or a wait.

    That is `torch.nn.attention.varlen.varlen_attn`, for where `varlen_reason` has none. It launches the same blocks for
    batches of the same shapes and `longest`.

    Args:
        query (Tensor): `[B, W, H, d]`.
        key (Tensor): `[B, W, G, d]`.
        value (Tensor): `[B, W, G, d]`.
        documents (Documents): what stands in all B W positions.
        scale (float): of the scores.
        window (int | None): keys that a position sees at most, its own the last; None: all of its document so far.

    Returns:
        Tensor: `[B, W, H, d]`.
    """
    dense = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    q, k, v = (tensor.flatten(0, 1) for tensor in dense)  # [B W, H, d], [B W, G, d]
    offsets, longest = documents.offsets.to(query.device), documents.longest
    back = -1 if window is None or window >= longest else window - 1  # keys before a position's own; -1: all
    if torch.compiler.is_compiling():
        from torch.nn.attention.varlen import varlen_attn

        shares, sees = query.shape[2] != key.shape[2], (back, 0)
        out = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=sees, enable_gqa=shares)
    else:
        # What varlen_attn calls, with torch's own gradient. Its operators are Python's: 290 us of host time a layer,
        # forward and backward, for 83 (with kernels that do nothing).
        call = (q, k, v, offsets, offsets, longest, longest, 0.0, back < 0, False)
        windows = {"window_size_left": back, "window_size_right": 0}
        out = torch.ops.aten._flash_attention_forward(*call, scale=scale, **windows)[0]
    return out.view(query.shape)  # type: ignore[union-attr]  # of varlen_attn a tuple, asked for more


def varlen_reason(
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    dropout: float = 0.0,
    capability: tuple[int, int] | None = None,
) -> str | None:
    """Why `varlen_attention` cannot serve, in words; None where it can.

    Args:
        device_type (str): "meta", of tensors without data, stands for CUDA.
        dtype (torch.dtype): in which queries, keys and values are multiplied.
        head_dim (int): d.
        dropout (float): of attention's weights.
        capability (tuple[int, int] | None): of the GPU; None: not asked.
    """
    if device_type not in ("cuda", "meta"):
        return f"it runs on CUDA, and this is {device_type}"
    if not _has_varlen(device_type):
        return f"torch {torch.__version__} has none"
    if capability is not None and capability < (8, 0):
        return "it needs a GPU of compute capability 8.0, and this one has {}.{}".format(*capability)
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or float16, and this is {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256 or 192 < head_dim <= 224:  # those not on every GPU in a backward pass
        return f"its heads have a multiple of 8 channels, up to 192 or 232 to 256, and these have {head_dim}"
    if dropout > 0:
        return f"it has no dropout, and attention's is {dropout}"
    return None


def varlen_documents(
    documents: Documents, device: torch.device, dtype: torch.dtype, head_dim: int, *, dropout: float = 0.0
) -> Documents | None:
    """The documents, if `varlen_attention` can serve here; else None, and off the CPU a line that says why, once.

    Args:
        documents (Documents): of a batch.
        device (torch.device): of the attention.
        dtype (torch.dtype): of the weights, which autocast may change for products.
        head_dim (int): d.
        dropout (float): of attention's weights.
    """
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    reason = varlen_reason(device.type, dtype, head_dim, dropout=dropout, capability=capability)
    if reason is None:
        return documents
    if device.type != "cpu":
        say_masked(reason)
    return None


@functools.cache
def say_masked(reason: str) -> None:
    """Say that packed documents are not attended to by torch's kernel for them, and why; each reason once."""
    logger.warning("packed documents: attention takes a mask, since torch's kernel for them cannot serve: %s", reason)


@functools.cache
def _has_varlen(device_type: str) -> bool:
    """Whether this torch has it, and for CUDA was built with it."""
    built = device_type != "cuda" or torch.backends.cuda.is_flash_attention_available()
    return built and importlib.util.find_spec("torch.nn.attention.varlen") is not None


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


def cross_entropy_(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row and its gradient, `softmax(logits) - onehot(target)`; not differentiable.

    Computed in float32. Triton (CUDA) and C++ (CPU) turn the logits into the gradient in place, which moves 6 bytes for
    each logit in bf16 on CUDA, and 4 of a row that stays in the second-level cache; the eager formula moves 72 there.

    Args:
        logits (Tensor): `[N, V]`, any strides; may be overwritten. On CUDA rows that begin at multiples of 16 elements
            are read several times as fast.
        target (Tensor): int64 `[N]`; negative: not scored, loss and gradient are zero.

    Returns:
        tuple[Tensor, Tensor]: (gradient `[N, V]` in the dtype of the logits, loss `[N]` float32). Both are NaN in a row
            that has a NaN, plus infinity or nothing but minus infinity, and in Triton where the target is beyond V.

    Raises:
        ValueError, IndexError, RuntimeError: not a target a row, or one beyond V (looked for on the CPU only).
    """
    working = torch.float64 if logits.dtype == torch.float64 else torch.float32
    backend = choose("cross_entropy_", logits.device, working)
    if logits.stride(1) != 1 or logits.stride(0) < logits.shape[1]:  # columns that are not adjacent, rows that overlap
        logits = logits.contiguous()
    if backend is not None and logits.dtype in TAKEN.get(backend.name, ()):
        return logits, backend.cross_entropy_(logits, target)
    scored = target >= 0
    target = target.clamp_min(0)[:, None]
    values = logits.to(working)
    values = values.sub_(values.amax(dim=-1, keepdim=True))  # or the loss loses what large logits have in common
    log_normalizer = values.logsumexp(dim=-1, keepdim=True)
    nll = (log_normalizer - values.gather(1, target)).squeeze(1).where(scored, 0.0)
    gradient = values.sub_(log_normalizer).exp_()
    gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
    return gradient.masked_fill_(~scored[:, None], 0.0).to(logits.dtype), nll.float()
