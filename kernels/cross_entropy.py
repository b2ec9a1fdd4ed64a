"""The cross-entropy of a language model's logits, which become their own gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import choose


def cross_entropy_(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row and its gradient, `softmax(logits) - onehot(target)`; not differentiable.

    Computed in float32, on a CPU in one go where the C++ operators are to be had.

    Args:
        logits (Tensor): `[N, V]`; may be overwritten.
        target (Tensor): int64 `[N]`; negative: not scored, loss and gradient are zero.

    Returns:
        tuple[Tensor, Tensor]: (gradient `[N, V]` in the dtype of the logits, loss `[N]` float32).
    """
    working = torch.float64 if logits.dtype == torch.float64 else torch.float32
    backend = choose("cross_entropy_", logits.device, working) if logits.device.type == "cpu" else None
    fits = logits.dtype in (torch.float32, torch.bfloat16) and logits.stride(-1) == 1
    if backend is not None and backend.name == "cpp" and fits:
        nll: Tensor = torch.ops.planlm.cross_entropy_(logits, target)
        return logits, nll
    scored = target >= 0
    target = target.clamp_min(0)[:, None]
    values = logits.to(working)
    values = values.sub_(values.amax(dim=-1, keepdim=True))  # or the loss loses what large logits have in common
    log_normalizer = values.logsumexp(dim=-1, keepdim=True)
    nll = (log_normalizer - values.gather(1, target)).squeeze(1).where(scored, 0.0)
    gradient = values.sub_(log_normalizer).exp_()
    gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
    return gradient.mul_(scored[:, None]).to(logits.dtype), nll.float()
