"""The cross-entropy of a language model's logits, which become their own gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import choose

TAKEN = {"triton": (torch.float32, torch.bfloat16, torch.float16), "cpp": (torch.float32, torch.bfloat16)}
"""Dtypes of logits that a backend has an implementation for; the eager formula has the others."""


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
