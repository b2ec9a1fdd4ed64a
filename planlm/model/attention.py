"""Attention of an LM that takes the plan, and packed documents by a kernel of their own.

transformers hands keyword arguments of the LM's call down to its attention function. So the plan of a call is one of
its arguments, `plan`, added to attention's result before the output projection (docs/method.md's `adapter`): nothing of
it stays in the model, threads and copies do not share it, activation checkpointing has it when it computes a layer
again, and it enters whatever stands for the projection, LoRA too.

Sizes: B sequences of W positions, H heads, d channels of a head.
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
from planlm.speedups.lm import packed_attention

NAME = "planlm"
"""transformers' name of `attend`."""


def take_plans(lm: PreTrainedModel) -> None:
    """Have the attention of `lm` take the keyword `plan` (`LayerPlans`); without it the LM is what it was.

    The LM's own implementation, which its configuration names and users may change, goes on computing the attention.
    """
    for module in attention_modules(lm):
        module.config = _AttentionConfig(lm.config)  # type: ignore[assignment]


class _AttentionConfig:
    """An LM's configuration as its attention modules see it: another implementation, everything else as it is."""

    _attn_implementation = NAME

    def __init__(self, config: PreTrainedConfig) -> None:
        self.lm_config = config

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
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        mixed = packed_attention(query, key, value, attention_mask, scaling)
    else:
        eager = sys.modules[type(module).__module__].eager_attention_forward  # each family has its own
        config: Any = module.config.lm_config  # type: ignore[union-attr]
        function = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
        own: Any = _Original(module) if is_flash_attention_requested(config) else module
        mixed, weights = function(own, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if plan is not None:
        mixed = plan.add(module.layer_idx, mixed)  # type: ignore[arg-type]
    return mixed, weights


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
