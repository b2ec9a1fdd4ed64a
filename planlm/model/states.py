"""What the planner reads of the LM: the mean of its states over each sentence's tokens.

The states are those below some layer of a pass without plans. So they depend on the text alone, causally, and the plan
of a sentence on nothing of it. They are not detached: the LM's loss reaches the layers that made them.

Sizes: B windows of W positions, R planner sequences of n positions, d LM width, A dimensions of an embedding.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from planlm.errors import InputError
from planlm.model.families import OUTPUT_PROJECTIONS
from planlm.model.masks import document_masks
from planlm.plan_inputs import PlanInputs

_FINAL_NORMS = {"ln_f", "norm", "final_layer_norm"}
_POSITION_EMBEDDINGS = {"wpe"}
"""Names in the base models of the supported families."""


class _Nothing(nn.Module):
    """A position embedding that adds nothing."""

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros((), device=positions.device)


def lower_part(lm: PreTrainedModel, layers: int) -> nn.Module:
    """The base model of `lm` up to its layer `layers`, without the norm behind the last one; it shares all weights."""
    part, modules, name = _copied(lm)
    modules[name] = modules[name][:layers]
    return _with(part, {key: nn.Identity() if key in _FINAL_NORMS else child for key, child in modules.items()})


def upper_part(lm: PreTrainedModel, layers: int) -> nn.Module:
    """The base model of `lm` from its layer `layers` on: its `inputs_embeds` are what `lower_part` gives."""
    part, modules, name = _copied(lm)
    modules[name] = modules[name][layers:]
    for key, child in modules.items():
        if key in _POSITION_EMBEDDINGS:
            modules[key] = _Nothing()
        elif isinstance(child, nn.Dropout):
            modules[key] = nn.Identity()
    kinds = getattr(part.config, "layer_types", None)
    if kinds is not None:  # of attention, layer by layer
        part.config = copy.copy(part.config)
        part.config.layer_types = kinds[layers:]
    return _with(part, modules)


def _copied(lm: PreTrainedModel) -> tuple[Any, dict[str, Any], str]:
    """A copy of the base model, a copy of its list of parts, and the name of the layers among them."""
    return copy.copy(lm.base_model), dict(lm.base_model._modules), OUTPUT_PROJECTIONS[lm.config.model_type][0]


def _with(part: Any, modules: dict[str, Any]) -> nn.Module:
    part._modules = modules
    whole: nn.Module = part
    return whole


def segment_means(states: Tensor, owners: Tensor, count: int) -> Tensor:
    """Means `[count, d]` of states `[T, d]` by owner `[T]`, -1 for none; float32, 0 where an owner has no state."""
    owners = owners.where(owners >= 0, count)
    sums = states.new_zeros(count + 1, states.shape[1], dtype=torch.float32).index_add(0, owners, states.float())
    counts = sums.new_zeros(count + 1).index_add(0, owners, sums.new_ones(len(owners)))
    return (sums / counts.clamp(min=1)[:, None])[:count]


def sentence_states(states: Tensor, inputs: PlanInputs, position_ids: Tensor | None) -> Tensor:
    """Where the planner reads them, the mean states of the sentences that a batch's windows show.

    Position t carries the segment of the sentence that holds token t + 1, so token t is the segment's of position
    t - 1. A window's first token is left out, but where its position's segment is a document's first sentence.

    Args:
        states: `[B, W, d]`.
        inputs: with a planner sequence for each window: in another window a sentence may have other states.
        position_ids: int64 `[B, W]`, going on by one within a window; by default a sequence is one.

    Returns:
        `[R, n, d]` float32, at each position that of the sentence before, 0 where it has no state.
    """
    segments, (sequence, position) = inputs.segment_ids, inputs.segment_rows.unbind(1)
    rows, length = inputs.sentence_embeddings.shape[:2]
    before = nn.functional.pad(segments, (1, 0), value=-1)[:, :-1]
    if position_ids is not None:
        begins = nn.functional.pad(position_ids.expand(segments.shape).diff(dim=1) != 1, (1, 0))
        before = before.masked_fill(begins, -1)
    numbers = position if inputs.sentence_positions is None else inputs.sentence_positions[sequence, position]
    is_first = (segments >= 0) & (numbers[segments.clamp(min=0)] == 0)
    owners = before.where(before >= 0, segments.where(is_first, -1))
    # Sentence i's state belongs where sentence i + 1 stands, if its document goes on there.
    follows = position + 1 < length
    if inputs.sentence_positions is not None:
        after = inputs.sentence_positions[sequence, (position + 1).clamp(max=length - 1)]
        follows = follows & (after == numbers + 1)
    places = (sequence * length + position + 1).where(follows, -1)
    places = places[owners.clamp(min=0)].where(owners >= 0, -1)  # [B, W], of each token
    return segment_means(states.flatten(0, 1), places.flatten().to(states.device), rows * length).unflatten(
        0, (rows, length)
    )


def read_states(
    lm: PreTrainedModel, layers: tuple[int, int], inputs: PlanInputs, call: dict[str, Any]
) -> tuple[PlanInputs, nn.Module, dict[str, Any]]:
    """Have the lower layers of `lm` make what the planner reads.

    Args:
        lm: the LM.
        layers: so many below the states that are read, and below the first conditioned layer.
        inputs: a batch's plan inputs.
        call: arguments that the base model is to be called with.

    Returns:
        (plan inputs with the states, the base model to call and its arguments; where neither a cache nor a lower plan
        needs the whole of it, that is what lies above the states).

    Raises:
        InputError: the call continues a cache.
    """
    if call["past_key_values"] is not None and call["past_key_values"].get_seq_length():
        raise InputError(
            "past_key_values: the planner reads the LM's states of the whole text; give sentence_states among the plan "
            "inputs, or the whole text without a cache"
        )
    names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "documents")
    read = {name: call[name] for name in names if name in call}
    if "documents" not in call and call["attention_mask"] is None and call["position_ids"] is not None:
        read["attention_mask"] = document_masks(lm, call["position_ids"])
    states = lower_part(lm, layers[0])(**read, use_cache=False).last_hidden_state
    inputs = replace(inputs, sentence_states=sentence_states(states, inputs, call["position_ids"]))
    plain = call.keys() == {*read, "past_key_values", "use_cache"} and call["use_cache"] is False
    if plain and layers[0] <= layers[1] and lm.base_model._compiled_call_impl is None:
        return inputs, upper_part(lm, layers[0]), call | {"input_ids": None, "inputs_embeds": states}
    return inputs, lm.base_model, call


def text_states(lower: nn.Module, texts: list[list[int]], device: torch.device) -> list[Tensor]:
    """The states `[T, d]` of each text of T tokens; `lower` is an LM's lower part."""
    rows = [torch.tensor(tokens, dtype=torch.long) for tokens in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # causal: what stands behind does not matter
    states = lower(input_ids=ids, use_cache=False).last_hidden_state
    return [of_text[: len(tokens)] for of_text, tokens in zip(states, texts, strict=True)]


class StateInput(nn.Module):
    """Projects the LM's mean states to what the planner takes for a sentence's embedding.

    Args:
        lm_width: d.
        width: A.
        kind: `lm`: in place of the embedding; `both`: added to it, from a projection that starts at zero, so that a
            pre-trained planner starts as it is.
    """

    def __init__(self, lm_width: int, width: int, kind: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(lm_width)
        self.projection = nn.Linear(lm_width, width)
        self.unknown: nn.Parameter | None = None
        nn.init.zeros_(self.projection.bias)
        if kind == "both":
            nn.init.zeros_(self.projection.weight)
        else:  # of unit length, as embeddings are
            nn.init.normal_(self.projection.weight, std=(lm_width * width) ** -0.5)
            self.unknown = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, embeddings: Tensor, states: Tensor | None) -> Tensor:
        """Embeddings `[R, n, A]` and mean states `[R, n, d]`, 0 for none, as the planner's input `[R, n, A]`."""
        if states is None:
            states = embeddings.new_zeros(*embeddings.shape[:2], self.projection.in_features)
        known = (states != 0).any(dim=-1, keepdim=True).to(embeddings.device)
        projected = self.projection(self.norm(states.to(self.norm.weight)))
        if self.unknown is None:
            return embeddings + projected.where(known, 0.0)
        return projected.where(known, self.unknown.to(projected.dtype))
