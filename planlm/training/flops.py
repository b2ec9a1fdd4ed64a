"""Floating-point operations of a step."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def lm_flops(lm: PreTrainedModel, num_tokens: int, window: float, *, trained: bool, first_layer: int = 0) -> float:
    """Model FLOPs of forward and backward of an LM: its matrix products, once, whatever is computed again.

    Two a weight and token forward, two for the gradient of the layer's input, two for that of its weight; attention's
    two products over the `window / 2` positions that a causal token sees on average. Embedding look-ups are none, the
    head counts.

    Args:
        lm: the LM.
        num_tokens: tokens of the step, padding included.
        window: positions of a row; where attention sees fewer, twice as many as a token sees on average.
        trained: whether the LM's weights get gradients.
        first_layer: frozen layers below this one (0-based) have no backward.
    """
    config = lm.config
    layers = config.num_hidden_layers
    head: nn.Linear = lm.get_output_embeddings()  # type: ignore[assignment]
    weights = sum(module.weight.numel() for module in lm.base_model.modules() if isinstance(module, nn.Linear | Conv1D))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * 2 * (window / 2) * config.num_attention_heads * width * layers
    share = 1.0 if trained else 1.0 - first_layer / layers  # of the layers that have a backward
    passes_of_weights = 1 + share + (1 if trained else 0)
    of_head = 2 * head.weight.numel() * (3 if trained else 2)
    return num_tokens * (2 * weights * passes_of_weights + attention * (1 + 2 * share) + of_head)
