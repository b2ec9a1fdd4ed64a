"""The joint model: a planner, a codebook and a Hugging Face causal LM conditioned on the planner's mixture.

Sizes: B windows of W positions, S plan segments, K actions, A action dimension, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from planlm import speedups
from planlm.errors import InputError
from planlm.kernels import environment
from planlm.model.adapter import PlanAdapter, Plans
from planlm.model.attention import check_mask, take_plans, within_documents
from planlm.model.bottleneck import Bottleneck, BottleneckPlans
from planlm.model.card import hub_name
from planlm.model.configuration import PLANNER_SHAPE, WITHOUT_PLAN, PlanLMConfig
from planlm.model.families import check_family, lm_layers, output_projections
from planlm.model.insertion import InsertedPlans, check_generation, check_plain
from planlm.model.loading import ModelFolder, load_lm
from planlm.model.lora import add_lora
from planlm.model.loss import divergence, token_losses
from planlm.model.output import PlanLMOutput
from planlm.model.planner import Planner, codebook_fingerprint
from planlm.model.states import StateInput, lower_part, read_states, text_states
from planlm.model.text import Text, generating, generation_inputs, generation_selection, plan_inputs, remember, text_of
from planlm.model.tracking import SentenceTracker
from planlm.plan_inputs import PlanInputs, shows_plan_inputs
from planlm.pretrained.names import absolute
from planlm.pretrained.tokenizer import load_tokenizer
from planlm.selections import SELECTIONS


class PlanLMForCausalLM(ModelFolder, GenerationMixin):
    """Planner-conditioned causal LM; a transformers model with `save_pretrained`, `from_pretrained` and `generate`.

    Called with `input_ids` alone it finds the sentences in the text itself, embeds and plans them; training and
    evaluation pass the plan inputs of a prepared corpus instead. Sentences are embedded with the model at
    `config.encoder`, loaded at first use. Without an encoder every text is one sentence, planned without context.

    Nothing of a call stays in the model. What a KV cache continues, its text, stays with the cache.

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
        speedups.apply(lm)
        take_plans(lm, config.attention_window)
        self.lm = lm
        planner = Planner(config.action_dim, config.num_actions, **config.planner_shape)
        has_plan = config.conditioning != "bottleneck"
        self.planner = planner if has_plan else None
        self.adapter = PlanAdapter(lm, config) if has_plan else Bottleneck(lm, config, planner)
        self.planner_input: StateInput | None = None
        if config.planner_input != "embeddings":
            if (config.planner_lm_layers or 0) > num_layers:
                raise InputError(
                    f"planner LM layers: {config.planner_lm_layers} asked, the LM has {num_layers}; set fewer"
                )
            width = lm.get_input_embeddings().weight.shape[1]
            self.planner_input = StateInput(width, config.action_dim, config.planner_input)
        self.vocab_size = config.vocab_size
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
        base, tokenizer = load_lm(lm, dtype), load_tokenizer(lm)
        known, ids = base.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values(), default=0) + 1
        if known < ids:
            raise InputError(
                f"{lm}: its tokenizer has {ids} tokens and the LM embeddings for {known}; give the tokenizer that "
                "belongs to the LM, or resize the LM's embeddings (resize_token_embeddings)"
            )
        if lora is not None:
            add_lora(base, *lora)
        planner = planner or Planner.of_codebook(codebook)
        shape, fingerprint = planner.settings, codebook_fingerprint(codebook)
        if shape["codebook_fingerprint"] != fingerprint:
            raise InputError(
                "the planner was trained on other actions than the corpus has; pre-train one on this corpus"
            )
        if conditioned_layers is None:
            conditioned_layers = max(1, len(output_projections(base)) - 2)
        config = PlanLMConfig(
            text_config=copy.deepcopy(base.config),
            attn_implementation=base.config._attn_implementation,
            num_actions=shape["num_actions"],
            action_dim=shape["action_dim"],
            **{f"planner_{name}": shape[name] for name in PLANNER_SHAPE},
            codebook_fingerprint=fingerprint,
            conditioned_layers=conditioned_layers,
            base_model=hub_name(lm),
            **{**options, "encoder": absolute(options.get("encoder", ""))},
        )
        model = cls(config, lm=base).to(dtype)
        if model.planner is not None:
            model.planner.load_state_dict(planner.state_dict())
            model.codebook.data.copy_(codebook)
            model.centroids = codebook
        model.generation_config = base.generation_config
        model._tokenizer = tokenizer
        return model

    def get_output_embeddings(self) -> nn.Module:
        """The LM's head."""
        return self.lm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Give the LM another head."""
        self.lm.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the LM's token embedding and head; see transformers."""
        resized = self.lm.resize_token_embeddings(*args, **kwargs)
        self.config.vocab_size = self.vocab_size = self.lm.config.vocab_size
        return resized

    @property
    def codebook(self) -> nn.Parameter:
        """Action embeddings `[K, A]`, or of each conditioned layer `[L, K, A]`."""
        return self.adapter.codebook  # type: ignore[return-value]

    def plans(self, selection: str) -> bool:
        """Whether sentences are planned under this selection.

        Raises:
            InputError: the model has no plan and the selection wants one.
        """
        if self.planner is None and selection not in WITHOUT_PLAN:
            raise InputError(f"selection {selection}: the model has no plan (conditioning bottleneck); choose fixed")
        return selection != "none" and self.planner is not None

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As transformers does, and always without reentrant autograd: all layers share one plan, and its gradient."""
        super().gradient_checkpointing_enable(
            (gradient_checkpointing_kwargs or {}) | {"use_reentrant": False}, **kwargs
        )

    def compile_lm(self) -> None:
        """Hand the LM to `torch.compile`; it is compiled at its first call.

        Raises:
            InputError: there is no C++ compiler.
        """
        if environment.compiler_program(default="g++") is None:  # torch's own default
            raise InputError("--compile needs a C++ compiler: install g++, or name one in the variable CXX")
        self.lm.base_model.compile()

    def _plan_inputs(
        self, plan: PlanInputs | Text | None, fields: dict[str, Any], call: tuple[Any, ...], selection: str
    ) -> tuple[PlanInputs | None, Text | None]:
        """What a call's plans are made from, if there are any, and the text where the model finds its sentences itself.

        Args:
            plan: see `forward`.
            fields: of `PlanInputs`, given by name.
            call: the arguments of `text_of`.
            selection: how plans are made.
        """
        if plan is None and "segment_ids" in fields:
            return PlanInputs(**fields), None
        if isinstance(plan, PlanInputs):
            return plan.replaced(**fields), None
        if not self.plans(selection) and not fields.get("want_oracle_nll"):
            return None, None
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise InputError(
                "a model that is traced or exported cannot find the sentences of its text: give segment_ids, "
                "segment_rows and sentence_embeddings among the inputs, or selection='none'"
            )
        text = plan or text_of(self, *call)
        input_ids, inputs_embeds, *_ = call
        width = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        reads = self._reads(selection, bool(fields.get("want_oracle_nll")))
        lower = lower_part(self.lm, self.state_layers) if reads else None
        read = None if lower is None else lambda texts: text_states(lower, texts, text.ids.device)
        found = plan_inputs(text, width, self.config.action_dim, read)
        return (found.replaced(**fields) if fields else found), text

    def _reads(self, selection: str, want_oracle_nll: bool) -> bool:
        """Whether a call's planner reads the LM's states."""
        return self.planner_input is not None and (SELECTIONS[selection].asks_planner or want_oracle_nll)

    def planner_states(self, inputs: PlanInputs, rows: Tensor | None = None) -> Tensor:
        """What the planner makes of each segment's past, `[S, A]`; or of the sentences `rows`, as `segment_rows`."""
        assert self.planner is not None
        sentences = inputs.sentence_embeddings
        if self.planner_input is not None:
            sentences = self.planner_input(sentences, inputs.sentence_states)
        where = (inputs.sentence_positions, inputs.sentence_cu_seqlens, inputs.sentence_longest)
        states: Tensor = self.planner(sentences, *where)
        return states[(inputs.segment_rows if rows is None else rows).unbind(1)]

    @property
    def state_layers(self) -> int:
        """LM layers below the states that the planner reads."""
        return self.config.planner_lm_layers or len(lm_layers(self.lm)) - self.config.conditioned_layers

    def _plan(self, inputs: PlanInputs, selection: str) -> tuple[Plans, Tensor | None, Tensor | None]:
        """Plan a call's segments.

        Returns:
            (what runs the LM with the plans, the planner's cross-entropy `[S]` with the oracle actions if there are
            any, its logits `[S, K]` if it ran).
        """
        assert self.planner is not None and not isinstance(self.adapter, Bottleneck)
        facts, logits, noise, oracle = SELECTIONS[selection], None, None, inputs.actions
        states, rows = None, inputs.segment_rows
        if facts.needs_others:
            if inputs.shuffled_rows is None:
                raise InputError(f"selection {selection!r}: a text alone has no other document's plans; choose soft")
            rows, selection = torch.cat((rows, inputs.shuffled_rows)), "soft"
        if facts.asks_planner or inputs.want_oracle_nll:
            states = self.planner_states(inputs, rows)
            logits = self.planner.head(states).float()
            logits = logits if inputs.action_bias is None else logits + inputs.action_bias
        shown = logits
        if logits is not None and facts.needs_others:
            logits, shown = logits.chunk(2)
            shown = shown.detach()
        if facts.noisy and self.training:  # without noise gumbel is soft, and gumbel-hard takes its arg-max
            assert logits is not None
            # Standard Gumbel noise, drawn once per sentence, for all layers and tokens alike.
            noise = self.config.gumbel_scale * -torch.empty_like(logits).exponential_().log()
        if facts.needs_oracle and oracle is not None:
            oracle = oracle.clamp_min(0)  # segments that only fill a batch have to have some action
        if logits is not None and oracle is not None and inputs.action_noise is not None:
            oracle = oracle.where(oracle >= 0, (logits + inputs.action_noise).argmax(dim=-1))
        projection, plans = self.adapter(
            shown,
            inputs,
            temperature=self.config.plan_temperature,
            selection=selection,
            oracle=oracle,
            oracle_weight=inputs.oracle_weight,
            noise=noise,
            top_k=self.config.plan_top_k if facts.needs_top_k else None,
        )
        if inputs.actions is None:
            return plans, None, logits
        if logits is not None and facts.needs_others:  # the planner is right where it predicts its own document
            oracle_nll = nn.functional.cross_entropy(logits, inputs.actions, ignore_index=-1, reduction="none")
        else:
            oracle_nll = projection.oracle_nll.where(inputs.actions >= 0, 0.0)
        if states is not None and inputs.want_oracle_nll and inputs.actions_ahead is not None:
            states = states[: len(inputs.segment_rows)]
            oracle_nll = self.planner.horizon_nll(states, oracle_nll, inputs.actions_ahead)
        return plans, oracle_nll, logits

    @shows_plan_inputs
    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        plan: PlanInputs | Text | None = None,
        selection: str | None = None,
        **kwargs: Any,
    ) -> PlanLMOutput:
        """Run the conditioned LM; without `plan` the model plans the text `input_ids` `[B, W]` itself.

        Arguments not named here are those of transformers. Those of its losses are taken too: `shift_labels`, `[B, W]`
        the token after each position, -100 where not scored, upon which logits are not kept; `num_items_in_batch`, by
        which the sum of losses is divided in place of the number of labels. With `reference`, another LM's last hidden
        states and head (None: this one's), the divergence from it at `shift_labels` is measured too. Fields of
        `PlanInputs` are taken by name, in place of `plan`'s or of the text's: what traces a model, and most collators,
        know tensors only. `cu_seqlens` and `longest`, see `PlanBatch`, say of `position_ids` what CUDA wants to know.

        Args:
            inputs_embeds: `[B, W, d]` in place of `input_ids`; the tokens whose embeddings stand there are the text,
                anything else, as trained prompts, is none.
            labels: `[B, W]` in transformers' form: the same tokens as `input_ids`, -100 where not scored.
            plan: a batch's plan inputs; or the whole text, where `input_ids` continue a cache; by default what the
                cache remembers.
            selection: docs/method.md's; default the configuration's. "none" switches the plan off.

        Raises:
            InputError: labels that are no tokens, a mask of whole numbers in four dimensions, a KV cache whose text is
                not known, a text to be planned while the model is traced or exported, or a selection that needs other
                documents where none are given.
        """
        selection = selection or generation_selection(self) or self.config.selection
        if selection not in SELECTIONS:
            raise ValueError(f"selection: got {selection!r}, needs one of {', '.join(SELECTIONS)}")
        losses = {name: kwargs.pop(name, None) for name in ("shift_labels", "num_items_in_batch", "reference")}
        fields = {name: kwargs.pop(name, None) for name in PlanInputs.__dataclass_fields__}
        fields = {name: value for name, value in fields.items() if value is not None}
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        check_mask(attention_mask)
        if kwargs.setdefault("use_cache") is None and not self.config.use_cache:
            kwargs["use_cache"] = False
        for wanted in ("output_hidden_states", "output_attentions"):
            if kwargs.get(wanted) is None and getattr(self.config, wanted):
                kwargs[wanted] = True
        call = (input_ids, inputs_embeds, attention_mask, position_ids, past_key_values)
        inputs, text = self._plan_inputs(plan, fields, call, selection)
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        inserts = self.config.conditioning == "insert" and inputs is not None and selection != "none"
        arguments = within_documents(self.lm, arguments, inserts)
        outputs, oracle_nll, action_logits = self._run(inputs, text, selection, arguments)
        if text is not None:
            remember(text, outputs.past_key_values, action_logits)
        return PlanLMOutput(
            **self._score(outputs.last_hidden_state, labels, **losses, keep=logits_to_keep),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            oracle_nll=oracle_nll,
            action_logits=action_logits,
        )

    def _run(
        self, inputs: PlanInputs | None, text: Text | None, selection: str, arguments: dict[str, Any]
    ) -> tuple[Any, Tensor | None, Tensor | None]:
        """Run the LM's base model, called with `arguments`, under the plans of what `_plan_inputs` gave.

        Returns:
            (its output, and as `_plan` has them the planner's cross-entropy and its logits).
        """
        base: nn.Module = self.lm.base_model
        plans: Plans | BottleneckPlans | None = None
        oracle_nll = action_logits = None
        if isinstance(self.adapter, Bottleneck):
            plans = self.adapter.plans()
        elif inputs is not None and (selection != "none" or inputs.want_oracle_nll):
            if text is None and inputs.sentence_states is None and self._reads(selection, inputs.want_oracle_nll):
                layers = (self.state_layers, self.adapter.first_layer)
                inputs, base, arguments = read_states(self.lm, layers, inputs, arguments)
            plan = self._plan if text is None else text.planned_by(self)
            plans, oracle_nll, action_logits = plan(inputs, "uniform" if selection == "none" else selection)
        if plans is None or selection == "none":
            check_plain(arguments["past_key_values"])
            return base(**arguments), oracle_nll, action_logits
        if isinstance(plans, InsertedPlans) and inputs is not None:
            plans.begins, plans.most = None if text is None else text.begins(), inputs.most_segments
        return plans.run(base, arguments), oracle_nll, action_logits

    def _score(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        num_items_in_batch: int | Tensor | None,
        reference: tuple[Tensor, nn.Module | None] | None,
        keep: int | Tensor,
    ) -> dict[str, Tensor | None]:
        """Losses and logits, as `PlanLMOutput` has them, of hidden states `[B, W, d]`; see `forward`."""
        head, logits = self.get_output_embeddings(), None
        at = slice(-keep, None) if isinstance(keep, int) else keep
        if labels is None and shift_labels is None:
            return {"loss": None, "logits": head(hidden[:, at])}
        if labels is not None:
            logits = head(hidden)
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]  # type: ignore[arg-type]
        inputs = (hidden if logits is None else logits).flatten(0, 1)
        targets = shift_labels.reshape(-1).to(inputs.device)
        nll_sum, token_nll = token_losses(inputs, head if logits is None else None, targets, self.loss_kernel)
        kl_sum = None
        if reference is not None:
            kl_sum = divergence(inputs, head, (reference[0].flatten(0, 1), reference[1]), targets)
        count = (targets != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return {
            "loss": nll_sum / (count.to(nll_sum.device) if isinstance(count, Tensor) else count),
            "logits": None if logits is None else logits[:, at],
            "nll_sum": nll_sum,
            "kl_sum": kl_sum,
            "token_nll": None if token_nll is None else token_nll.view(shift_labels.shape),
        }

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        tracker: SentenceTracker | None = None,
        selection: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does; each finished sentence is embedded and the next one planned.

        Args:
            inputs: `[B, W]` prompt tokens, or `input_ids=` or `inputs_embeds=`.
            tracker: follows the sentences; give one to force actions or to read the sentences afterwards.
            selection: see `forward`.

        Raises:
            InputError: `cache_implementation="paged"`, see `generate_batch`; or what `insert` cannot be generated with.
        """
        if self.config.conditioning == "insert" and selection != "none":
            check_generation(self.generation_config, kwargs)
        if kwargs.get("cache_implementation") == "paged":
            self.generate_batch()
        with generating(self, inputs, tracker, selection or self.config.selection, kwargs):
            return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' inputs for one step, and the text that is planned."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, past_key_values, attention_mask, inputs_embeds, **kwargs
        )
        return inputs | generation_inputs(self, input_ids, next_sequence_length, past_key_values, attention_mask)

    def generate_batch(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: continuous batching mixes several requests' texts in one sequence, and plans belong to texts."""
        raise InputError("continuous batching is not supported; call generate() with a padded batch")

    init_continuous_batching = continuous_batching_context_manager = generate_batch
