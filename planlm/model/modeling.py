"""The joint model: a planner, a codebook and a Hugging Face causal LM conditioned on the planner's mixture.

Sizes: B windows, W positions, T = B W, R rows of n places of the planner, S plan segments, K actions, A action
dimension, D stacked input widths of the conditioned layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from planlm.errors import InputError
from planlm.kernels import PlanProjection, environment, plan_projection
from planlm.model.adapter import PlanAdapter
from planlm.model.configuration import PlanLMConfig
from planlm.model.families import check_family, output_projections
from planlm.model.fused import document_starts, fuse
from planlm.model.loading import ModelFolder, load_lm
from planlm.model.lora import add_lora
from planlm.model.loss import LOSSES
from planlm.model.planner import Planner, codebook_fingerprint, default_heads
from planlm.model.tracking import SentenceTracker
from planlm.text.alignment import load_tokenizer
from planlm.text.assets import absolute

PLANNED = ("soft", "hard", "straight-through", "gumbel", "gumbel-hard", "top-k")
"""Selections that ask the planner."""

GUMBEL = ("gumbel", "gumbel-hard")


@dataclass
class PlanLMOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: mean NLL of the labelled tokens (nats), where labels were given.
        nll_sum: their sum, differentiable.
        token_nll: `[B, W]` float32 NLL of each labelled token, detached, 0 elsewhere; None from a loss kernel that
            sums them itself.
        oracle_nll: `[S]` planner cross-entropy with the oracle action, where actions were given; differentiable.
        action_logits: `[S, K]` planner logits, where the planner ran.
        logits: `[B, W or logits_to_keep, V]`, where no labels were given or they were in transformers' form.
        past_key_values: KV cache.
    """

    loss: Tensor | None = None
    nll_sum: Tensor | None = None
    token_nll: Tensor | None = None
    oracle_nll: Tensor | None = None
    action_logits: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None


class PlanLMForCausalLM(ModelFolder, GenerationMixin):
    """Planner-conditioned causal LM; a transformers model with `save_pretrained`, `from_pretrained` and `generate`.

    Called with `input_ids` alone it finds the sentences in the text itself, embeds and plans them; training and
    evaluation pass the plan inputs of a prepared corpus instead. Sentences are embedded with the model at
    `config.encoder`, loaded at first use.

    Args:
        config: the configuration.
        lm: the LM to condition; by default one is built from `config.text_config` with random weights.

    Raises:
        InputError: unsupported LM family, or more conditioned layers than the LM has.
    """

    config: PlanLMConfig
    config_class = PlanLMConfig
    base_model_prefix = "lm"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    loss_kernel = "chunked"
    """Which of `LOSSES` scores labelled tokens; a matter of speed, so not in the configuration."""

    def __init__(self, config: PlanLMConfig, lm: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        check_family(config.text_config)
        if lm is None:
            lm = AutoModelForCausalLM.from_config(config.text_config)
        else:
            for module in lm.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # post_init must leave its weights alone
        num_layers = len(output_projections(lm))
        if not 1 <= config.conditioned_layers <= num_layers:
            raise InputError(
                f"conditioned layers: {config.conditioned_layers} asked, the LM has {num_layers}; set 1 to {num_layers}"
            )
        fuse(lm)
        self.lm = lm
        self.planner = Planner(
            config.action_dim, config.num_actions, config.planner_layers, config.planner_heads, config.planner_dropout
        )
        self.codebook = nn.Parameter(torch.zeros(config.num_actions, config.action_dim))
        self.adapter = PlanAdapter(lm, config.action_dim, config.conditioned_layers, config.gate)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Everything outside the LM is initialised where it is built."""

    @classmethod
    def from_lm(
        cls,
        lm: str,
        codebook: Tensor,
        *,
        planner: Planner | None = None,
        conditioned_layers: int | None = None,
        dtype: torch.dtype = torch.float32,
        lora: tuple[int, float] | None = None,
        **options: Any,
    ) -> PlanLMForCausalLM:
        """Condition a pre-trained LM.

        Args:
            lm: causal LM by hub name or folder.
            codebook: `[K, A]` action embeddings.
            planner: pre-trained planner; by default an untrained one whose head is the codebook.
            conditioned_layers: topmost layers to condition; default all but two, at least one (the papers').
            dtype: of all weights.
            lora: rank and alpha of `add_lora`, for training; `merged` makes weights that can be saved.
            options: further fields of `PlanLMConfig`.

        Raises:
            InputError: the LM cannot be loaded, its family is not supported, or the planner does not fit the codebook.
        """
        base = load_lm(lm, dtype)
        if lora is not None:
            add_lora(base, *lora)
        num_actions, action_dim = codebook.shape
        fingerprint = codebook_fingerprint(codebook)
        if planner is None:
            heads = default_heads(action_dim)
            planner = Planner(action_dim, num_actions, heads=heads, codebook_fingerprint=fingerprint)
            planner.initialize_head(codebook)
        shape = planner.settings
        if shape["codebook_fingerprint"] != fingerprint:
            raise InputError(
                "the planner was trained on other actions than the corpus has; pre-train one on this corpus"
            )
        config = PlanLMConfig(
            text_config=base.config,
            attn_implementation=base.config._attn_implementation,  # or it is reset for the LM, and its mask with it
            num_actions=num_actions,
            action_dim=action_dim,
            planner_layers=int(shape["layers"]),
            planner_heads=int(shape["heads"]),
            planner_dropout=shape["dropout"],
            codebook_fingerprint=fingerprint,
            conditioned_layers=max(1, len(output_projections(base)) - 2)
            if conditioned_layers is None
            else conditioned_layers,
            **{**options, "encoder": absolute(options.get("encoder", ""))},
        )
        model = cls(config, lm=base).to(dtype)
        model.planner.load_state_dict(planner.state_dict())
        with torch.no_grad():
            model.codebook.copy_(codebook)
        model.generation_config = base.generation_config
        model._tokenizer = load_tokenizer(lm)
        return model

    def get_input_embeddings(self) -> nn.Module:
        """The LM's token embedding."""
        return self.lm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The LM's head."""
        return self.lm.get_output_embeddings()

    def compile_lm(self) -> None:
        """Hand the LM to `torch.compile`; it is compiled at its first call.

        Raises:
            InputError: there is no C++ compiler.
        """
        if environment.compiler_program(default="g++") is None:  # torch's own default
            raise InputError("--compile needs a C++ compiler: install g++, or name one in the variable CXX")
        self.lm.base_model.compile()

    def plan(
        self,
        segment_rows: Tensor,
        sentence_embeddings: Tensor,
        sentence_positions: Tensor | None = None,
        *,
        actions: Tensor | None = None,
        selection: str | None = None,
        oracle_weight: float | Tensor = 0.0,
        want_oracle_nll: bool = False,
    ) -> tuple[PlanProjection, Tensor | None]:
        """Plan the given segments.

        Args:
            segment_rows: `[S, 2]`, row and place in `sentence_embeddings`.
            sentence_embeddings: `[R, n, A]`, see `Planner`.
            sentence_positions: `[R, n]`, see `Planner`.
            actions: `[S]` oracle actions, -1 for none; where `selection` is "oracle" action 0 then stands in, as rows
                that only fill a batch have to have some.
            selection: docs/method.md's selection; default the configuration's.
            oracle_weight: share of the oracle action in the mixture, a number or `[S]`.
            want_oracle_nll: run the planner for its cross-entropy even where the selection does not ask it.

        Returns:
            (projection with `projected` `[S, D]`, planner logits `[S, K]` or None where the planner did not run).
        """
        selection = selection or self.config.selection
        logits = None
        if selection in PLANNED or want_oracle_nll:
            states = self.planner(sentence_embeddings, sentence_positions)  # [R, n, A]
            hidden = states[segment_rows[:, 0], segment_rows[:, 1]]  # [S, A]
            logits = self.planner.head(hidden).float()  # [S, K]
        noise = None
        if selection in GUMBEL and self.training:  # without noise gumbel is soft, and gumbel-hard takes its arg-max
            assert logits is not None
            noise = self.config.gumbel_scale * _gumbel_like(logits)
        projection = plan_projection(
            self.codebook.new_zeros(len(segment_rows), len(self.codebook)) if logits is None else logits,
            self.codebook,
            self.adapter.weight,
            self.adapter.bias,
            temperature=self.config.plan_temperature,
            selection=selection,
            oracle=actions if actions is None or selection != "oracle" else actions.clamp_min(0),
            oracle_weight=oracle_weight,
            noise=noise,
            top_k=self.config.plan_top_k if selection == "top-k" else None,
        )
        if actions is not None and selection == "oracle":
            projection = projection._replace(oracle_nll=projection.oracle_nll.where(actions >= 0, 0.0))
        return projection, logits

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        *,
        shift_labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        segment_rows: Tensor | None = None,
        sentence_embeddings: Tensor | None = None,
        sentence_positions: Tensor | None = None,
        actions: Tensor | None = None,
        selection: str | None = None,
        oracle_weight: float | Tensor = 0.0,
        want_oracle_nll: bool = False,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> PlanLMOutput:
        """Run the conditioned LM; without `segment_ids` the model plans the text `input_ids` `[B, W]` itself.

        Arguments not named here are those of transformers and of `plan`.

        Args:
            labels: `[B, W]` in transformers' form: the same tokens as `input_ids`, -100 where not scored.
            shift_labels: `[B, W]` the token after each position, -100 where not scored; logits are then not kept.
            segment_ids: `[B, W]` plan segment of the sentence that holds the token after each position, -1 for none.
            selection: see `plan`; "none" switches the plan off.
        """
        selection = selection or self.config.selection
        result = PlanLMOutput()
        projected = None
        if selection != "none" or want_oracle_nll:
            if segment_ids is None or segment_rows is None or sentence_embeddings is None:
                tracker = SentenceTracker(self.tokenizer, self.encoder)
                segment_ids, segment_rows, sentence_embeddings, _ = tracker.inputs(input_ids, attention_mask)
            projection, result.action_logits = self.plan(
                segment_rows,
                sentence_embeddings,
                sentence_positions,
                actions=actions,
                selection="uniform" if selection == "none" else selection,
                oracle_weight=oracle_weight,
                want_oracle_nll=want_oracle_nll,
            )
            projected = None if selection == "none" else projection.projected
            result.oracle_nll = None if actions is None else projection.oracle_nll
        self.adapter.condition(projected, segment_ids)
        if position_ids is not None and attention_mask is None and past_key_values is None and not use_cache:
            attention_mask = document_starts(self.lm, position_ids, self._dtype_of_products())
        outputs = self.lm.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        if not self.lm.is_activation_checkpointing:  # which runs the hooks once more, in the backward pass
            self.adapter.condition(None, None)
        result.past_key_values = outputs.past_key_values
        self._score(result, outputs.last_hidden_state, labels, shift_labels, logits_to_keep)
        return result

    def _dtype_of_products(self) -> torch.dtype:
        where = self.device.type
        return torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else self.dtype

    def _score(
        self, result: PlanLMOutput, hidden: Tensor, labels: Tensor | None, shift_labels: Tensor | None, keep: int
    ) -> None:
        """Fill in the losses, or logits, of hidden states `[B, W, d]`; see `forward`."""
        if shift_labels is None or labels is not None:
            result.logits = self.get_output_embeddings()(hidden[:, -keep:])
        if labels is not None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        if shift_labels is not None:
            head: nn.Linear = self.get_output_embeddings()  # type: ignore[assignment]
            targets = shift_labels.reshape(-1)
            loss = LOSSES[self.loss_kernel]
            nll_sum, token_nll = loss(hidden.reshape(len(targets), -1), head.weight, targets, head.bias)
            result.nll_sum = nll_sum
            result.token_nll = None if token_nll is None else token_nll.view(shift_labels.shape)
            result.loss = nll_sum / (targets != -100).sum().clamp(min=1)

    def generate(
        self, inputs: Tensor | None = None, *args: Any, tracker: SentenceTracker | None = None, **kwargs: Any
    ) -> Any:
        """Generate as transformers does; each finished sentence is embedded and the next one planned.

        Args:
            inputs: `[B, W]` prompt tokens, or `input_ids=`.
            tracker: follows the sentences; give one to force actions or to read the sentences afterwards.
        """
        if (kwargs.get("selection") or self.config.selection) != "none":
            kwargs["tracker"] = tracker or SentenceTracker(self.tokenizer, self.encoder)
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        tracker: SentenceTracker | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' inputs for one step, and the plan inputs of the positions it computes."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, attention_mask=attention_mask, **kwargs
        )
        if tracker is not None:
            segment_ids, rows, embeddings, forced = tracker.inputs(
                input_ids, attention_mask, inputs["input_ids"].shape[1]
            )
            inputs |= {"segment_ids": segment_ids, "segment_rows": rows, "sentence_embeddings": embeddings}
            if forced is not None:
                inputs |= {"actions": forced, "oracle_weight": (forced >= 0).float()}
        return inputs


def _gumbel_like(logits: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape of `logits`: drawn once per sentence, for all layers and tokens alike."""
    return -torch.empty_like(logits).exponential_().log()
