"""Masks of sequences that hold documents behind each other, made without waiting for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate, packed_sequence_mask_function

from planlm.speedups.lm import first_seen


def document_masks(lm: PreTrainedModel, position_ids: Tensor) -> Any:
    """transformers' masks for an LM's call whose rows may hold documents behind each other; None: it may make them.

    It would first look whether there are several. On a CPU it may; elsewhere the host would wait for the answer, so
    they are made for that case.

    Args:
        lm: the LM, or its base model.
        position_ids: `[B, W]`, going on by one within a document.
    """
    if _may_ask(position_ids.device):
        return None
    within = packed_sequence_mask_function(first_seen(position_ids))
    shape = torch.empty(*position_ids.shape, 0, dtype=lm.dtype, device=position_ids.device)
    return create_masks_for_generate(lm.config, shape, None, None, and_mask_function=within)


def _may_ask(device: torch.device) -> bool:
    return device.type == "cpu"
