"""Low-rank adaptation of the LM (Hu et al., LoRA, 2021) through peft, and weights with it merged in."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

NAME = "default"
"""peft's name of the one adapter there is."""


def add_lora(lm: PreTrainedModel, rank: int, alpha: float) -> None:
    """Put a trainable product of two matrices beside every linear layer of `lm` but its head, in place.

    The second matrix starts at zero: the LM computes what it did.

    Args:
        lm: the LM.
        rank: r, inner size of the products.
        alpha: the products are multiplied with alpha / r.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes a second, and few need it

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # peft says that it has noticed GPT-2's transposed weights
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"), lm, NAME)


@contextlib.contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """A model as it was before `add_lora`, for a time. Whether parameters take gradients stays: FSDP looks at that."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of the model without LoRA, each product added to what it stands beside.

    Args:
        model: with LoRA, the weights of which may be divided among processes.
        weights: its state dict, whole. Nothing is changed in it.
    """
    from peft.tuners.lora import LoraLayer

    found = dict(weights)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            down, up = (found.pop(f"{name}.lora_{part}.{NAME}.weight") for part in "AB")
            for key in [key for key in found if key.startswith(f"{name}.base_layer.")]:
                found[f"{name}.{key.rsplit('.', 1)[1]}"] = found.pop(key)
            product = layer.scaling[NAME] * (up.float() @ down.float())  # [out, in]
            weight = found[f"{name}.weight"]
            found[f"{name}.weight"] = (weight + (product.T if layer.fan_in_fan_out else product)).to(weight.dtype)
    return found


def lora_parameters(lm: PreTrainedModel, prefix: str) -> dict[str, nn.Parameter]:
    """What LoRA has added, by name."""
    return {name: value for name, value in lm.named_parameters(prefix=prefix) if ".lora_" in name}
