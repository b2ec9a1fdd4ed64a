"""Attention of an LM that takes the plan, sees the last tokens only, and packed documents by a kernel of their own.

transformers hands keyword arguments of the LM's call down to its attention function. So the plan of a call is one of
its arguments, `plan`, added to attention's result before the output projection (docs/method.md's `adapter`): nothing of
it stays in the model, threads and copies do not share it, activation checkpointing has it when it computes a layer
again, and it enters whatever stands for the projection, LoRA too.

So is a limited window (`attention_window`): every call of an LM's attention passes `attend`, which narrows whatever it
is to compute, by the cheapest means that the call allows.

And so are packed documents: a batch says where they begin (`within_documents`), and on CUDA `attend` hands that to
torch's flash attention for documents of any lengths.

Sizes: B sequences of W positions, L keys, H heads, d channels of a head.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from planlm import speedups
from planlm.errors import InputError
from planlm.kernels import Documents, say_masked, varlen_attention, varlen_documents
from planlm.model.adapter import LayerPlans
from planlm.model.families import attention_modules
from planlm.model.masks import document_masks
from planlm.speedups.lm import (
    attention_dropout,
    document_starts,
    first_seen,
    has_packed_attention,
    in_autocast_dtype,
    packed_attention,
)

NAME = "planlm"
"""transformers' name of `attend`."""


_HIDDEN = -1e3
"""What is added to a score that nobody is to see is below: its exponential is 0 in every dtype."""


def take_plans(lm: PreTrainedModel, window: int | None = None) -> None:
    """Have the attention of `lm` take the keyword `plan` (`LayerPlans`); without it the LM is what it was.

    The LM's own implementation, which its configuration names and users may change, goes on computing the attention.

    Args:
        lm: an LM of a supported family.
        window: tokens that each layer attends to, a position's own included; None: all.
    """
    for module in attention_modules(lm):
        module.config = _AttentionConfig(lm.config, window)  # type: ignore[assignment]


class _AttentionConfig:
    """An LM's configuration as its attention modules see it: another implementation, everything else as it is."""

    _attn_implementation = NAME

    def __init__(self, config: PreTrainedConfig, window: int | None) -> None:
        self.lm_config, self.window = config, window

    def __getattr__(self, name: str) -> Any:
        if name == "lm_config" or name.startswith("__"):  # while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.lm_config, name)


class _Original:
    """An attention module with the LM's configuration, for implementations that look into it."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self.config = module, module.config.lm_config  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def within_documents(lm: PreTrainedModel, call: dict[str, Any], inserts: bool = False) -> dict[str, Any]:
    """A call of an LM's base model whose attention keeps documents apart that share a row.

    Args:
        lm: the LM.
        call: its arguments. Two more say where documents begin, `cu_seqlens` (None: not known) and `longest`, as
            `kernels.Documents` has them: what `position_ids` say too, without a look at the device.
        inserts: plans are to become positions, between those that a batch has counted.

    Returns:
        The call without those two. With the keyword `documents`, None where they are kept apart otherwise, its mask is
        for `attend` alone; without it transformers makes one of `position_ids`, or on a GPU has made it.
    """
    call = dict(call)
    offsets, longest = call.pop("cu_seqlens", None), call.pop("longest", 0)
    positions = call["position_ids"]
    if positions is None:
        return call
    is_plain = call["attention_mask"] is None and call["past_key_values"] is None and not call["use_cache"]
    starts = document_starts(lm, positions) if is_plain else None
    if starts is not None:
        return call | {"attention_mask": starts}
    if offsets is None or "attention" not in speedups.ON:
        return call | ({"attention_mask": document_masks(lm, positions)} if is_plain and not inserts else {})
    documents = _served(lm, call, Documents(offsets, longest))
    nothing = positions.new_empty(0, 0, 0, 0)  # so that transformers makes no mask, for which it waits for the device
    if documents is not None:
        return call | {"attention_mask": nothing, "documents": documents}
    if not is_plain or inserts:
        return call
    if getattr(lm.config, "sliding_window", None) is not None or lm.config._attn_implementation != "sdpa":
        return call | {"attention_mask": document_masks(lm, positions)}
    if len(offsets) == len(positions) + 1:  # a document a row
        return call | {"attention_mask": nothing, "documents": None}
    at = torch.arange(positions.shape[1], device=positions.device)
    seen = (at <= at[:, None]) & (at >= first_seen(positions)[:, :, None])  # [B, W, W]
    return call | {"attention_mask": seen[:, None], "documents": None}


def _served(lm: PreTrainedModel, call: dict[str, Any], documents: Documents) -> Documents | None:
    """The documents, if torch's kernel for them serves in this call; else None, and on a GPU a line that says why."""
    config, where = lm.config, call["position_ids"].device
    reason = None
    if call["attention_mask"] is not None:
        reason = "attention_mask is given"
    elif call["past_key_values"] is not None or call["use_cache"]:
        reason = "a KV cache is in use"
    elif config._attn_implementation != "sdpa":
        reason = f"attn_implementation is {config._attn_implementation!r}"
    elif call.get("output_attentions"):
        reason = "output_attentions is set"
    if reason is None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return varlen_documents(documents, where, lm.dtype, head_dim, dropout=attention_dropout(lm))
    if where.type != "cpu" and not is_flash_attention_requested(config):  # which needs no mask
        say_masked(reason)
    return None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    plan: LayerPlans | None = None,
    scaling: float | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface; query, key and value are `[B, H, W, d]`, the result is `[B, W, H, d]`.

    What else it takes are the plans of a call, and what `within_documents` gives.
    """
    weights = None
    config: Any = module.config.lm_config  # type: ignore[union-attr]
    window: int | None = module.config.window  # type: ignore[union-attr,assignment]
    if documents is not None:
        narrow = [size for size in (window, kwargs.get("sliding_window")) if size is not None]
        mixed = _by_document(query, key, value, documents, scaling, min(narrow, default=None))
        return (mixed if plan is None else plan.add(module.layer_idx, mixed)), None  # type: ignore[arg-type]
    if isinstance(attention_mask, Tensor) and attention_mask.numel() == 0:  # of `within_documents`
        attention_mask = None
    if window is not None and window < key.shape[2]:
        if is_flash_attention_requested(config):
            kwargs["sliding_window"] = min(window, kwargs.get("sliding_window") or window)
        else:
            key, value, attention_mask = _within(window, query, key, value, attention_mask, config, kwargs)
    if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.int64:
        mixed = packed_attention(query, key, value, attention_mask, scaling)
    else:
        eager = sys.modules[type(module).__module__].eager_attention_forward  # each family has its own
        function = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
        own: Any = _Original(module) if is_flash_attention_requested(config) else module
        mixed, weights = function(own, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if plan is not None:
        mixed = plan.add(module.layer_idx, mixed)  # type: ignore[arg-type]
    return mixed, weights


def _by_document(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None, window: int | None
) -> Tensor:
    """Attention of query, key and value `[B, H, W, d]` by torch's kernel for documents, as `[B, W, H, d]`."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (tensor.transpose(1, 2) for tensor in in_autocast_dtype(query, key, value))
    return varlen_attention(query, key, value, documents, scale, window)


def _within(
    window: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    config: PreTrainedConfig,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask of attention to the last `window` tokens that each query sees, whatever mask says which.

    One new token needs the end of the cache; positions from the beginning go to the kernel for packed documents, whose
    time grows with the window, where it serves, else get a mask; a given mask keeps the last `window` of what it shows:
    behind padding, in a static cache, within a sliding window of the LM's own.
    """
    width = query.shape[2]
    if mask is None and width == 1:
        return key[:, :, -window:], value[:, :, -window:], None
    if mask is None:  # the first `width` keys belong to the queries, others are room in a static cache
        key, value, at = key[:, :, :width], value[:, :, :width], torch.arange(width, device=key.device)
        starts = (at - window + 1).clamp_min(0)
        if config._attn_implementation == "sdpa" and has_packed_attention(query, kwargs.get("dropout", 0.0)):
            return key, value, starts.expand(len(query), -1)[:, None, :, None]
        return key, value, ((at <= at[:, None]) & (at >= starts[:, None]))[None, None]
    if not isinstance(mask, Tensor):
        raise InputError(
            f"attention_window: not with the attention {config._attn_implementation!r}; set attn_implementation to "
            "sdpa, eager or flash_attention_2"
        )
    if mask.dtype == torch.int64:
        at = torch.arange(width, device=mask.device)[:, None]
        return key, value, mask.maximum(at - window + 1)
    seen = mask if mask.dtype == torch.bool else mask > _HIDDEN
    recent = seen.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1) <= window  # of the keys behind, at most so many seen
    if mask.dtype == torch.bool:
        return key, value, mask & recent
    return key, value, mask.masked_fill(~recent, torch.finfo(mask.dtype).min)


def check_mask(mask: Any) -> None:
    """Refuse masks that transformers hands on as they are and attention takes for something else.

    Raises:
        InputError: a mask of four dimensions that is neither boolean nor what is added to the scores.
    """
    for one in mask.values() if isinstance(mask, dict) else [mask]:  # by kind of attention layer
        if isinstance(one, Tensor) and one.ndim == 4 and not (one.dtype == torch.bool or one.is_floating_point()):
            raise InputError(
                f"attention_mask: 4 dimensions of {one.dtype}; give a boolean mask (True where a token is seen), or a "
                "floating-point one that is added to the scores"
            )


AttentionInterface.register(NAME, attend)
