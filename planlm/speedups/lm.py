"""Faster parts of an LM: GPT-2's activation, attention within packed documents, cross-entropy in place.

Sizes: B sequences of W positions, H heads, d channels of a head, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from planlm import kernels, speedups


class TanhGELU(NewGELUActivation):
    """GPT-2's activation. transformers' eight operations keep five matrices for the backward pass, torch's its input.

    Without a backward pass it stays transformers' own, so that an LM evaluates to the same bits as there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The activation of each element."""
        if input.requires_grad:
            return F.gelu(input, approximate="tanh")
        plain: Tensor = super().forward(input)
        return plain


def replace_activations(lm: PreTrainedModel) -> None:
    """Put `TanhGELU` where GPT-2's activation is."""
    for module in lm.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, TanhGELU())


def document_starts(lm: PreTrainedModel, position_ids: Tensor) -> Tensor | None:
    """What `packed_attention` takes for a mask, int64 `[B, 1, W, 1]`: where the document of each position begins.

    None where transformers' own masks have to serve.

    Args:
        lm: whose attention will see it.
        position_ids: `[B, W]`, going on by one within a document.
    """
    config, where = lm.config, position_ids.device
    if (
        config._attn_implementation != "sdpa"
        or getattr(config, "sliding_window", None) is not None
        or not _has_kernel(where, lm.dtype, attention_dropout(lm))
    ):
        return None
    return first_seen(position_ids)[:, None, :, None]


def first_seen(position_ids: Tensor) -> Tensor:
    """Where the document of each position begins in its row, int64 `[B, W]`.

    By transformers' rule: where positions do not go on by one.
    """
    begins = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
    at = torch.arange(position_ids.shape[1], device=position_ids.device)
    return at.where(begins, 0).cummax(dim=1).values


def attention_dropout(lm: PreTrainedModel) -> float:
    """The dropout of attention's weights in a call of an LM."""
    config = lm.config
    dropout: float = getattr(config, "attn_pdrop", getattr(config, "attention_dropout", 0.0))
    return dropout if lm.training else 0.0


def has_packed_attention(query: Tensor, dropout: float) -> bool:
    """Whether `packed_attention` is in use and has a kernel of its own for a query under this dropout."""
    return _has_kernel(query.device, query.dtype, dropout)


def _has_kernel(where: torch.device, dtype: torch.dtype, dropout: float) -> bool:
    if "attention" not in speedups.ON or dropout > 0 or where.type != "cpu":
        return False
    autocast = torch.is_autocast_enabled(where.type)
    return kernels.has_packed_attention(where, torch.get_autocast_dtype(where.type) if autocast else dtype)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scaling: float | None) -> Tensor:
    """Attention within documents of query, key and value `[B, H, W, d]`, as `[B, W, H, d]`; see `document_starts`."""
    query, key, value = (tensor.transpose(1, 2) for tensor in in_autocast_dtype(query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return kernels.packed_attention(query, key, value, starts[:, 0, :, 0], scale)


def in_autocast_dtype(*tensors: Tensor) -> list[Tensor]:
    """Queries, keys and values in the dtype of products: under autocast rotary embeddings leave float32."""
    where, dtype = tensors[0].device.type, tensors[0].dtype
    if torch.amp.is_autocast_available(where) and torch.is_autocast_enabled(where):
        dtype = torch.get_autocast_dtype(where)
    return [tensor.to(dtype) for tensor in tensors]


def cross_entropy_(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.cross_entropy_`, in place on a CPU where this piece is in use."""
    if "cross-entropy" in speedups.ON:
        return kernels.cross_entropy_(logits, target)
    with kernels.use_backend("reference"):
        return kernels.cross_entropy_(logits, target)
