"""Parts of transformers' LMs replaced by faster ones that compute the same.

Sizes: B rows, W positions, H heads, d channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from planlm.kernels import gelu, has_packed_attention, packed_attention

ATTENTION = "planlm"
"""transformers' name of `attention`: its `sdpa`, and `packed_attention` where `document_starts` stand for the mask."""


def fuse(lm: PreTrainedModel) -> None:
    """Replace what has a faster equivalent, in place; names and weights stay as they are."""
    if lm.config._attn_implementation == "sdpa":
        lm.config._attn_implementation = ATTENTION
    for module in lm.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, FusedGELU())


class FusedGELU(NewGELUActivation):
    """GPT-2's activation. transformers' eight operations keep five matrices for the backward pass, this one its input.

    Without a backward pass it stays transformers' own, so that an LM evaluates to the same bits as there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The activation of each element."""
        if input.requires_grad:
            return gelu(input)
        plain: Tensor = super().forward(input)
        return plain


def document_starts(lm: PreTrainedModel, position_ids: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What `attention` takes for a mask, int64 `[B, 1, W, 1]`: where the document of each position begins in its row.

    None where transformers' own masks have to serve.

    Args:
        lm: an LM that was fused.
        position_ids: `[B, W]`, going on by one within a document.
        dtype: in which attention will be computed.
    """
    config = lm.config
    dropout = getattr(config, "attn_pdrop", getattr(config, "attention_dropout", 0.0))
    if (
        config._attn_implementation != ATTENTION
        or getattr(config, "sliding_window", None) is not None
        or (lm.training and dropout > 0)
        or not has_packed_attention(position_ids.device, dtype)
    ):
        return None
    # transformers' rule: a document begins where positions do not go on by one.
    begins = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
    at = torch.arange(position_ids.shape[1], device=position_ids.device)
    return at.where(begins, 0).cummax(dim=1).values[:, None, :, None]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; query, key and value are `[B, H, W, d]`, the result is `[B, W, H, d]`."""
    if attention_mask is None or attention_mask.dtype != torch.int64:
        mixed: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return mixed
    where = query.device.type
    if torch.is_autocast_enabled(where):  # rotary embeddings leave float32
        dtype = torch.get_autocast_dtype(where)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    starts = attention_mask[:, 0, :, 0]
    return packed_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), starts, scale), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
