"""The text that a call of the model plans, where no prepared corpus gives plan inputs.

A call that continues a KV cache sees new tokens only; plans need the text from its beginning. So the text stays with
the cache, and a cache that was changed since (its texts reordered, say) is refused unless the change can be followed.
`generate()` knows the whole text at every step; what it was called with lies in a context variable while it runs.

Sizes: B texts, L tokens from the beginning on, W positions of the call, A dimensions of a sentence embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from planlm.errors import InputError
from planlm.model.insertion import num_tokens
from planlm.model.tracking import ReadStates, SentenceTracker
from planlm.plan_inputs import PlanInputs

if TYPE_CHECKING:
    from planlm.model.modeling import PlanLMForCausalLM

_AT_ONCE = 1 << 24
"""Scores of embeddings against the whole table that exist at a time."""


@dataclass(frozen=True)
class Text:
    """Texts from their beginning to the end of what a call computes.

    Attributes:
        ids: int64 `[B, L]`, -1 where no token is known.
        real: bool `[B, L]`, False where there is no text.
        tracker: finds the sentences; None: every text is one.
        positions: `[B, L]` where sequences hold several texts behind each other, see `SentenceTracker.inputs`.
    """

    ids: Tensor
    real: Tensor
    tracker: SentenceTracker | None
    positions: Tensor | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begins(self) -> Tensor:
        """bool `[B, L]`, the first position of each sentence's plan."""
        if self.tracker is None:
            return self.real & (self.real.cumsum(dim=1) == 1)
        return self.tracker.begins(self.ids, self.real, self.positions)

    def planned_by(self, model: PlanLMForCausalLM) -> Callable[[PlanInputs, str], tuple[Any, Tensor | None, Any]]:
        """What makes plans of this text, as `PlanLMForCausalLM._plan`.

        Within a `generate()` once for the same inputs, which a tracker gives as long as no sentence ends: the plan
        stays on the device.
        """
        running = None if torch.compiler.is_compiling() else _GENERATION.get()
        if running is None or running.model is not model or model.training or torch.is_grad_enabled():
            return model._plan

        def plan(inputs: PlanInputs, selection: str) -> tuple[Any, Tensor | None, Any]:
            if running.planned is None or running.planned[0] is not inputs or running.planned[1] != selection:
                running.planned = inputs, selection, model._plan(inputs, selection)
            return running.planned[2]

        return plan


@dataclass(frozen=True)
class _Memory:
    """What a cache knows of its text: the text, and the keys that the first layer had for it, as they were then.

    `length` counts the keys, `num_tokens` the tokens among them.
    """

    text: Text
    keys: Tensor | None
    length: int
    num_tokens: int
    version: int

    def __deepcopy__(self, memo: dict[int, Any]) -> _Memory:
        """A copied tensor counts anew how often it was written to."""
        keys = copy.deepcopy(self.keys, memo)
        return _Memory(copy.deepcopy(self.text, memo), keys, self.length, self.num_tokens, _version(keys))


@dataclass
class _Generation:
    """What `generate()` was called with.

    Attributes:
        before: the text that stood in `inputs_embeds`.
        prompt: what the tracker is to start from at the first step, which knows where padding is; then None.
        planned: the newest plans, behind the inputs and the selection that they were made from.
    """

    model: PlanLMForCausalLM
    selection: str
    tracker: SentenceTracker | None
    before: Tensor | None
    prompt: Text | None
    planned: tuple[PlanInputs, str, tuple[Any, Tensor | None, Any]] | None = None


_GENERATION: ContextVar[_Generation | None] = ContextVar("planlm_generation", default=None)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def text_of(
    model: PlanLMForCausalLM,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Any,
) -> Text:
    """The text of a plain call; arguments are those of `PlanLMForCausalLM.forward`.

    Raises:
        InputError: a cache whose text is not known.
    """
    if input_ids is None:
        assert inputs_embeds is not None
        input_ids = _tokens(model.get_input_embeddings(), inputs_embeds)
    past = num_tokens(cache)
    if past:
        return _continued(cache, past, input_ids, attention_mask)
    real = _real(attention_mask, input_ids, 0)
    several = position_ids is not None and position_ids.shape[-1] == input_ids.shape[1]
    positions = position_ids.expand(input_ids.shape) if several and position_ids is not None else None
    return Text(input_ids, real & (input_ids >= 0), _new_tracker(model), positions)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def plan_inputs(text: Text, width: int, dim: int, read: ReadStates | None = None) -> PlanInputs:
    """Plan inputs of the last `width` positions of a text whose sentence embeddings have `dim` dimensions.

    With `read` they hold the LM's states of each sentence too, where there are sentences.
    """
    length = min(width, text.ids.shape[1])
    if text.tracker is None:
        inputs = _one_sentence(text, length, dim)
    else:
        inputs = text.tracker.inputs(text.ids, text.real, length, text.positions, read)
    if width == length:
        return inputs
    # Positions that are no tokens of the text, as peft's trained prompts, stand before it.
    return replace(inputs, segment_ids=nn.functional.pad(inputs.segment_ids, (width - length, 0), value=-1))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def remember(text: Text, cache: Any, action_logits: Tensor | None) -> None:
    """Leave a text with the cache that holds its keys, if any, and the planner's logits with what tracks it."""
    if text.tracker is not None and action_logits is not None:
        text.tracker.record(action_logits)
    if cache is not None:
        keys = _keys(cache)
        cache.planlm_memory = _Memory(text, keys, int(cache.get_seq_length()), num_tokens(cache), _version(keys))


@contextmanager
def generating(
    model: PlanLMForCausalLM,
    inputs: Tensor | None,
    tracker: SentenceTracker | None,
    selection: str,
    kwargs: dict[str, Any],
) -> Iterator[None]:
    """What belongs to one `generate()`; arguments are those of `PlanLMForCausalLM.generate`.

    Where sentences end in the prompt is decided from all of it, behind it token by token, however many a step has.
    """
    before, start = None, None
    if model.plans(selection):
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        if embeds is not None and (prompt is None or prompt.shape[1] == 0):
            prompt = before = _tokens(model.get_input_embeddings(), embeds)
        cache = kwargs.get("past_key_values")
        memory: _Memory | None = getattr(cache, "planlm_memory", None) if num_tokens(cache) else None
        if tracker is None:
            tracker = _new_tracker(model) if memory is None else memory.text.tracker
        if tracker is not None and prompt is not None and prompt.shape[1] and memory is None:
            start = Text(prompt, _real(mask, prompt, 0) & (prompt >= 0), tracker)
    token = _GENERATION.set(_Generation(model, selection, tracker, before, start))
    try:
        yield
    finally:
        _GENERATION.reset(token)


def generation_selection(model: PlanLMForCausalLM) -> str | None:
    """The selection of the `generate()` that runs: calls by its logits processors (guidance) follow it."""
    running = _GENERATION.get()
    return running.selection if running is not None and running.model is model else None


def generation_inputs(
    model: PlanLMForCausalLM, input_ids: Tensor, next_sequence_length: int | None, cache: Any, mask: Tensor | None
) -> dict[str, Any]:
    """Keywords for `forward` at a step of `generate()`, none outside of it.

    Args:
        model: the model.
        input_ids: the text so far, or what is new of it.
        next_sequence_length: number of new tokens, where `input_ids` are all.
        cache: KV cache.
        mask: `[B, L]`, 0 on padding.
    """
    running = _GENERATION.get()
    if running is None or running.model is not model:
        return {}
    if not model.plans(running.selection):
        return {"selection": running.selection}
    past = num_tokens(cache)
    if running.before is not None:
        before = running.before.repeat_interleave(len(input_ids) // len(running.before), dim=0)
        input_ids = torch.cat((before, input_ids), dim=1)
    elif past and next_sequence_length is None:
        text = _continued(cache, past, input_ids, mask)
        return {"selection": running.selection, "plan": replace(text, tracker=running.tracker or text.tracker)}
    real = _real(mask, input_ids, 0) & (input_ids >= 0)
    if running.prompt is not None and running.tracker is not None:
        prompt, running.prompt = running.prompt, None
        known, width = prompt.real.clone(), min(prompt.real.shape[1], real.shape[1])
        known[:, :width] = real[:: len(real) // len(known), :width]  # one of each prompt's beams or samples
        running.tracker.start(prompt.ids, known & (prompt.ids >= 0))
    return {"selection": running.selection, "plan": Text(input_ids, real, running.tracker)}


def _continued(cache: Any, past: int, new: Tensor, mask: Any) -> Text:
    """The text that a cache remembers, with new tokens `[B, W]` behind it."""
    memory: _Memory | None = getattr(cache, "planlm_memory", None)
    if memory is None or len(memory.text.ids) != len(new) or not _unchanged(cache, memory):
        raise InputError(
            "past_key_values: the text behind this cache is not known, since it was filled or changed outside this "
            "model's calls; pass the whole text as input_ids without a cache, or use generate()"
        )
    before = memory.text
    ids = torch.cat((before.ids[:, :past].to(new.device), new), dim=1)
    real = _real(mask, new, past)
    if real.shape[1] == new.shape[1]:
        real = torch.cat((before.real[:, :past].to(new.device), real), dim=1)
    return Text(ids, real & (ids >= 0), before.tracker)


def _unchanged(cache: Any, memory: _Memory) -> bool:
    """Whether a cache holds what it held when its text was noted, or a beginning of that."""
    keys, then, past = _keys(cache), memory.keys, int(cache.get_seq_length())
    if keys is None or then is None or memory.text.ids.shape[1] != memory.num_tokens:
        return False
    if past != memory.length and memory.length != memory.num_tokens:  # cut where, in terms of tokens?
        return False
    if keys is then:  # a static cache is written to in place
        return past == memory.length and _version(keys) == memory.version
    if past > memory.length or keys.shape[-2] != past or then.shape[-2] != memory.length or len(keys) != len(then):
        return False
    return torch.equal(keys, then[..., :past, :].to(keys.device))


def _keys(cache: Any) -> Tensor | None:
    """Keys of the first layer, if this kind of cache shows them."""
    layers = getattr(cache, "layers", None)
    keys = getattr(layers[0], "keys", None) if layers else None
    return keys if isinstance(keys, Tensor) else None


def _version(keys: Tensor | None) -> int:
    """How often a tensor was written to; tensors of inference mode do not count."""
    return 0 if keys is None or keys.is_inference() else keys._version


def _real(mask: Any, ids: Tensor, past: int) -> Tensor:
    """Where there is text, `[B, past + W]` or, for want of more, `[B, W]`, from any mask that transformers takes."""
    if isinstance(mask, dict):  # by kind of attention layer
        mask = next((one for one in mask.values() if one is not None), None)
    width = ids.shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= width:
        return mask[:, -(past + width) :].to(ids.device).bool().expand(len(ids), -1)
    if isinstance(mask, Tensor) and mask.ndim == 4:  # a position that does not see itself is padding
        at = torch.arange(width, device=mask.device)
        own = mask[:, 0, at, past + at]
        return (own if own.dtype == torch.bool else own == 0).to(ids.device).expand(len(ids), -1)
    return torch.ones_like(ids, dtype=torch.bool)


def _new_tracker(model: PlanLMForCausalLM) -> SentenceTracker | None:
    return SentenceTracker(model.tokenizer, model.encoder) if model.has_encoder else None


def _one_sentence(text: Text, length: int, dim: int) -> PlanInputs:
    """Plan inputs of texts of which each is one sentence."""
    numbers = torch.arange(len(text.ids), device=text.ids.device)
    return PlanInputs(
        segment_ids=numbers[:, None].where(text.real, -1)[:, text.ids.shape[1] - length :],
        segment_rows=torch.stack((numbers, torch.zeros_like(numbers)), dim=1),
        sentence_embeddings=torch.zeros(len(numbers), 1, dim, device=numbers.device),
    )


@torch.no_grad()
def _tokens(embedding: nn.Module, inputs_embeds: Tensor) -> Tensor:
    """The tokens whose embeddings stand in `inputs_embeds` `[B, W, d]`, -1 where something else does."""
    table: Tensor = embedding.weight  # type: ignore[assignment]
    if table.is_meta:
        raise InputError("inputs_embeds: the embeddings are offloaded, so their tokens are not known; pass input_ids")
    flat = inputs_embeds.detach().to(table.device, table.dtype).flatten(0, 1)
    half_norms = table.float().square().sum(dim=1) / 2
    found = []
    for some in flat.split(max(1, _AT_ONCE // len(table))):
        nearest = (some.float() @ table.float().T - half_norms).argmax(dim=1)
        found.append(nearest.where((table[nearest] == some).all(dim=1), -1))
    return torch.cat(found).view(inputs_embeds.shape[:2]).to(inputs_embeds.device)
