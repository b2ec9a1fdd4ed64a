"""Configuration of the joint model, in transformers' form (`config.json`, model type `planlm`)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig
from transformers.configuration_utils import SubConfigSpec


class PlanLMConfig(PretrainedConfig):
    """Configuration of `PlanLMForCausalLM`; the method's symbols in brackets.

    Attributes:
        text_config: configuration of the conditioned LM. The name is the one under which transformers looks for the
            decoder of a composite model, so `generate()` sizes its KV cache by it.
        num_actions: number of actions [K].
        action_dim: dimension of an action embedding [d_a]; also the planner's width.
        planner_layers, planner_heads, planner_dropout: shape of the planner.
        conditioned_layers: number of topmost LM layers that receive the plan.
        gate: whether each conditioned channel has a zero-initialised gate [g].
        selection, plan_temperature, plan_top_k, gumbel_scale: how the plan is formed unless a call says otherwise.
        codebook_fingerprint: of the codebook that training started from; see `planner.codebook_fingerprint`.
        encoder: sentence encoder, by hub name or folder, that `generate()` embeds finished sentences with; `./...`
            and `../...` are looked for from the model's own folder first, so that both may be moved together.
        tokenizer_fingerprint: of the tokenizer saved with the model; see `alignment.tokenizer_fingerprint`.
    """

    model_type = "planlm"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2")
    }

    text_config: dict[str, Any] | PretrainedConfig | None = None
    num_actions: int = 1024
    action_dim: int = 384
    planner_layers: int = 2
    planner_heads: int = 6
    planner_dropout: float = 0.1
    conditioned_layers: int = 1
    gate: bool = False
    selection: str = "soft"
    plan_temperature: float = 1.0
    plan_top_k: int | None = None
    gumbel_scale: float = 1.0
    encoder: str = ""
    codebook_fingerprint: str = ""
    tokenizer_fingerprint: str = ""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Leave the class as it is: else transformers would copy PlanLM's sources into the folders it saves."""
