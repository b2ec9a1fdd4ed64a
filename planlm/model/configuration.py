"""Configuration of the joint model, in transformers' form (`config.json`, model type `planlm`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig
from transformers.configuration_utils import SubConfigSpec

from planlm.config import CONDITIONINGS, PLANNER_INPUTS
from planlm.errors import InputError
from planlm.selections import SELECTIONS

Rule = tuple[str, Callable[[Any], bool]]
"""What a value has to be, in words and as a check."""

COUNT: Rule = ("a whole number of at least 1", lambda value: _is_number(value, Integral) and value >= 1)
OPTIONAL_COUNT: Rule = ("null or a whole number of at least 1", lambda value: value is None or COUNT[1](value))
DROPOUT: Rule = ("a number from 0 to below 1", lambda value: _is_number(value, Real) and 0 <= value < 1)
TEXT: Rule = ("a text", lambda value: isinstance(value, str))
_RULES: dict[str, Rule] = {
    "num_actions": COUNT,
    "action_dim": COUNT,
    "planner_layers": COUNT,
    "planner_heads": COUNT,
    "planner_dropout": DROPOUT,
    "planner_context": OPTIONAL_COUNT,
    "planner_horizon": COUNT,
    "planner_input": (f"one of {', '.join(PLANNER_INPUTS)}", lambda value: value in PLANNER_INPUTS),
    "planner_lm_layers": OPTIONAL_COUNT,
    "conditioning": (f"one of {', '.join(CONDITIONINGS)}", lambda value: value in CONDITIONINGS),
    "conditioned_layers": ("a whole number", lambda value: _is_number(value, Integral)),  # the model knows how many
    "codebook_per_layer": ("true or false", lambda value: isinstance(value, bool)),
    "gate": ("true or false", lambda value: isinstance(value, bool)),
    "use_cache": ("true or false", lambda value: isinstance(value, bool)),
    "selection": (f"one of {', '.join(SELECTIONS)}", lambda value: value in list(SELECTIONS)),
    "plan_temperature": ("a number above 0", lambda value: _is_number(value, Real) and 0 < value < math.inf),
    "plan_top_k": OPTIONAL_COUNT,
    "gumbel_scale": ("a number of at least 0", lambda value: _is_number(value, Real) and 0 <= value < math.inf),
    "attention_window": ("null or a whole number of at least 1", lambda value: value is None or COUNT[1](value)),
    "action_labels": (
        "null or a list of texts without commas",
        lambda value: (
            value is None
            or (isinstance(value, list) and all(isinstance(label, str) and "," not in label for label in value))
        ),
    ),
    "base_model": TEXT,
    "trained": ("null or an object", lambda value: value is None or isinstance(value, dict)),
    "encoder": TEXT,
    "codebook_fingerprint": TEXT,
    "tokenizer_fingerprint": TEXT,
}


BY_LAYER = ("adapter", "bottleneck")
"""Conditionings of each of the topmost layers."""

WITHOUT_PLAN = ("fixed", "none")
"""Selections of the conditioning `bottleneck`: on, and off."""

PLANNER_SHAPE = ("layers", "heads", "dropout", "context", "horizon")
"""Fields of a planner's settings that are fields of `PlanLMConfig` too, under `planner_...`."""


def check_values(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Refuse values that break their rules.

    Raises:
        InputError: names them all in one line.
    """
    wrong = [
        f"{name} {str(values[name])[:40]!r}: expected {words}"
        for name, (words, holds) in rules.items()
        if not holds(values[name])
    ]
    if wrong:
        raise InputError("; ".join(wrong))


def conditioning_problems(
    conditioning: str, *, selection: str, gate: bool, codebook_per_layer: bool, planner_input: str
) -> list[str]:
    """What contradicts a conditioning, each named by its setting."""
    found = []
    if planner_input != PLANNER_INPUTS[0] and conditioning == "bottleneck":
        found.append("planner-input: has no meaning with conditioning bottleneck, which has no planner")
    if gate and conditioning in ("insert", "bottleneck"):
        found.append(f"gate: has no meaning with conditioning {conditioning}, which adds no plan to a state")
    if codebook_per_layer and conditioning != "adapter":
        found.append(f"codebook-per-layer: has no meaning with conditioning {conditioning}; it is for adapter")
    if conditioning == "bottleneck" and selection not in WITHOUT_PLAN:
        found.append(f"selection {selection}: conditioning bottleneck has no plan; set selection fixed")
    return found


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


class PlanLMConfig(PretrainedConfig):
    """Configuration of `PlanLMForCausalLM`; the method's symbols in brackets.

    Attributes:
        text_config: configuration of the conditioned LM. The name is the one under which transformers looks for the
            decoder of a composite model, so `generate()` sizes its KV cache by it.
        num_actions: number of actions [K].
        action_dim: dimension of an action embedding [d_a]; also the planner's width.
        planner_layers, planner_heads, planner_dropout: shape of the planner.
        planner_context: sentences that it sees, the last ones; None: all.
        planner_horizon: actions that it predicts, the next ones.
        planner_input: what the planner reads of a sentence.
        planner_lm_layers: number of LM layers below the states that it reads; None: all below the first conditioned.
        conditioning: how the plan enters the LM.
        conditioned_layers: number of topmost LM layers that receive the plan.
        codebook_per_layer: whether each conditioned layer has a codebook of its own.
        gate: whether each conditioned channel has a zero-initialised gate [g].
        selection, plan_temperature, plan_top_k, gumbel_scale: how the plan is formed unless a call says otherwise.
        action_labels: what users call the actions, in order, empty for one without; no commas, which separate actions.
        attention_window: tokens that each layer of the LM attends to, a position's own included; None: all.
        codebook_fingerprint: of the codebook that training started from; see `planner.codebook_fingerprint`.
        encoder: sentence encoder, by hub name or folder, that `generate()` embeds finished sentences with; `./...`
            and `../...` are looked for from the model's own folder first, so that both may be moved together. Empty:
            every text is planned as one sentence.
        tokenizer_fingerprint: of the tokenizer saved with the model; see `pretrained.tokenizer`.
        base_model: hub name of the LM that was conditioned, for the model card; empty where it was a folder.
        trained: what the last run of `planlm train` says of itself in the model card, by name.
        use_cache: transformers'; whether calls that do not say return a KV cache.

    Raises:
        InputError: values that no model can have, all of them in one line.
    """

    model_type = "planlm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values", "nll_sum", "token_nll", "kl_sum", "oracle_nll", "action_logits",
    ]  # fmt: skip
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2")
    }

    text_config: dict[str, Any] | PretrainedConfig | None = None
    num_actions: int = 1024
    action_dim: int = 384
    planner_layers: int = 2
    planner_heads: int = 6
    planner_dropout: float = 0.1
    planner_context: int | None = None
    planner_horizon: int = 1
    planner_input: str = "embeddings"
    planner_lm_layers: int | None = None
    conditioning: str = "adapter"
    conditioned_layers: int = 1
    codebook_per_layer: bool = False
    gate: bool = False
    selection: str = "soft"
    plan_temperature: float = 1.0
    plan_top_k: int | None = None
    gumbel_scale: float = 1.0
    attention_window: int | None = None
    action_labels: list[str] | None = None
    encoder: str = ""
    codebook_fingerprint: str = ""
    tokenizer_fingerprint: str = ""
    base_model: str = ""
    trained: dict[str, Any] | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse values that no model can have; `text_config` is checked by its own class."""
        super().__post_init__(**kwargs)
        check_values(vars(self), _RULES)
        names = ("selection", "gate", "codebook_per_layer", "planner_input")
        problems = conditioning_problems(self.conditioning, **{name: getattr(self, name) for name in names})
        if problems:
            raise InputError("; ".join(problems))
        if SELECTIONS[self.selection].needs_top_k and self.plan_top_k is None:
            raise InputError(f"selection {self.selection!r}: plan_top_k is missing")
        if self.plan_top_k is not None and self.plan_top_k > self.num_actions:
            raise InputError(f"plan_top_k {self.plan_top_k}: more than the {self.num_actions} actions")
        if self.action_labels is not None and len(self.action_labels) != self.num_actions:
            raise InputError(f"action_labels: {len(self.action_labels)} labels for {self.num_actions} actions")

    @property
    def planner_shape(self) -> dict[str, Any]:
        """The planner's `PLANNER_SHAPE`."""
        return {name: getattr(self, f"planner_{name}") for name in PLANNER_SHAPE}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Leave the class as it is: else transformers would copy PlanLM's sources into the folders it saves."""

    @property
    def vocab_size(self) -> int:
        """The LM's."""
        return self.get_text_config().vocab_size

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        """Of both, as `resize_token_embeddings` sets it."""
        self.get_text_config().vocab_size = size
