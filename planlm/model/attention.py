"""Attention of an LM that takes the plan, sees the last tokens only, and packed documents by a kernel of their own.

transformers hands keyword arguments of the LM's call down to its attention function. So the plan of a call is one of
its arguments, `plan`, added to attention's result before the output projection (docs/method.md's `adapter`): nothing of
it stays in the model, threads and copies do not share it, activation checkpointing has it when it computes a layer
again, and it enters whatever stands for the projection, LoRA too.

So is a limited window (`attention_window`): every call of an LM's attention passes `attend`, which narrows whatever it
is to compute, by the cheapest means that the call allows.

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

from planlm.errors import InputError
from planlm.model.adapter import LayerPlans
from planlm.model.families import attention_modules
from planlm.speedups.lm import has_packed_attention, packed_attention

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


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    plan: LayerPlans | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface; query, key and value are `[B, H, W, d]`, the result is `[B, W, H, d]`."""
    weights = None
    config: Any = module.config.lm_config  # type: ignore[union-attr]
    window: int | None = module.config.window  # type: ignore[union-attr,assignment]
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
