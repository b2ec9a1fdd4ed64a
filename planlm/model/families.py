"""Where the plan enters each supported LM family: the input of the attention output's projection."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from planlm.errors import InputError

OUTPUT_PROJECTIONS = {
    "gpt2": ("h", "attn.c_proj"),
    "gpt_neox": ("layers", "attention.dense"),
    "llama": ("layers", "self_attn.o_proj"),
    "mistral": ("layers", "self_attn.o_proj"),
    "olmo": ("layers", "self_attn.o_proj"),
    "olmo2": ("layers", "self_attn.o_proj"),
    "qwen2": ("layers", "self_attn.o_proj"),
    "qwen3": ("layers", "self_attn.o_proj"),
}
"""Model type -> (list of layers in the base model, attention output's projection in a layer)."""

FAMILY_NAMES = "GPT-2, OLMo, OLMo-2, Llama (SmolLM, TinyLlama), Mistral, Qwen 2 and 3, GPT-NeoX (Pythia)"


def check_family(config: PretrainedConfig) -> None:
    """Refuse an LM whose family has no entry in `OUTPUT_PROJECTIONS`.

    Raises:
        InputError: names the model type and lists the families.
    """
    if config.model_type not in OUTPUT_PROJECTIONS:
        raise InputError(f"LM family {config.model_type!r} is not supported; supported: {FAMILY_NAMES}")


def output_projections(lm: PreTrainedModel) -> list[nn.Module]:
    """Attention output projections of all layers of `lm`, from the bottom to the top.

    Raises:
        InputError: the LM's family is not supported.
    """
    check_family(lm.config)
    return [layer.get_submodule(OUTPUT_PROJECTIONS[lm.config.model_type][1]) for layer in lm_layers(lm)]


def attention_modules(lm: PreTrainedModel) -> list[nn.Module]:
    """The modules that hold the attention output projections, from the bottom to the top."""
    parent = OUTPUT_PROJECTIONS[lm.config.model_type][1].rpartition(".")[0]
    return [layer.get_submodule(parent) for layer in lm_layers(lm)]


def lm_layers(lm: PreTrainedModel) -> list[nn.Module]:
    """All layers of an LM of a supported family, from the bottom to the top."""
    return list(getattr(lm.base_model, OUTPUT_PROJECTIONS[lm.config.model_type][0]))


def input_width(projection: nn.Module) -> int:
    """Width of a projection's input: heads times head size, which need not be the LM's hidden size.

    GPT-2's Conv1D has another name for it.
    """
    width: int = projection.nx if isinstance(projection, Conv1D) else projection.in_features  # type: ignore[assignment]
    return width


def conditioned_widths(lm: PreTrainedModel, num_layers: int) -> tuple[int, list[int]]:
    """The lowest of the topmost `num_layers` layers (0-based), and the input widths of their output projections."""
    projections = output_projections(lm)
    first = len(projections) - num_layers
    return first, [input_width(projection) for projection in projections[first:]]


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is exactly of this kind and calling it does no more than that, so its weights may be read.

    LoRA puts another kind in its place; hooks, accelerate's among them, which fetches offloaded weights, want the call.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks) and "forward" not in vars(module)


def set_dropout(lm: PreTrainedModel, probability: float) -> None:
    """Give every dropout of a supported LM, attention's too, one probability."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = probability
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout"):
        if hasattr(lm.config, name):
            setattr(lm.config, name, probability)
