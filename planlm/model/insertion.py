"""Plans as positions of their own: docs/method.md's `insert`.

In front of the first position that carries a sentence's plan stands one more, which holds the projected plan. Nothing
is predicted there, and it has the position number of the token behind it: tokens keep the numbers, and with them the
distances, that they have without plans, and a window as long as the LM's context still fits. What stands before it does
not see it, since attention is causal in the order of the columns.

Without a KV cache each row is laid out by itself. Columns of a cache are shared by its rows: there a column is made for
a plan wherever any row has one, masked in the others. Which token a column is or stands before is then the same for all
rows and stays with the cache; which columns a row sees follows from its own text. So rows may be reordered.

Sizes: B sequences of W positions, N tokens from the beginning on, X columns with the plans', S plan segments, d hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import is_flash_attention_requested

from planlm.errors import InputError
from planlm.kernels import Documents
from planlm.model.masks import document_masks
from planlm.speedups.lm import document_starts

_DYNAMIC = (None, "dynamic", "dynamic_full", "offloaded")
"""Kinds of caches that grow by what they are given."""

_AHEAD = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "prefill_chunk_size")
"""Settings of generate() under which transformers counts on a column of the cache per token."""


def check_lm(lm: PreTrainedModel) -> None:
    """Refuse an LM whose attention counts positions.

    Raises:
        InputError: it has a sliding window.
    """
    if getattr(lm.config, "sliding_window", None) is not None:
        raise InputError(
            f"conditioning insert: the LM attends to the last {lm.config.sliding_window} positions, and plans would be "
            "counted among them; set its sliding_window to null, or choose adapter or embedding"
        )


def check_generation(config: Any, kwargs: dict[str, Any]) -> None:
    """Refuse kinds of generation that need one column of the KV cache per token.

    Args:
        config: the generation configuration that a call falls back on.
        kwargs: of `generate()`.

    Raises:
        InputError: names the setting.
    """
    config = kwargs.get("generation_config") or config
    settings = {name: kwargs.get(name, getattr(config, name, None)) for name in (*_AHEAD, "cache_implementation")}
    cache, kind = kwargs.get("past_key_values"), settings.pop("cache_implementation")
    wrong = [name for name, value in settings.items() if value]
    wrong += [] if kind in _DYNAMIC else ["cache_implementation"]
    wrong += ["past_key_values"] if cache is not None and cache.get_seq_length() else []
    if wrong:
        raise InputError(
            f"{', '.join(wrong)}: not supported with conditioning insert, where plans have columns of the KV cache; "
            "leave it out"
        )


def check_plain(cache: Any) -> None:
    """Refuse a cache in which plans have columns for a call without a plan.

    Raises:
        InputError: it is one.
    """
    if getattr(cache, "planlm_columns", None) is not None:
        raise InputError("past_key_values: plans are among its columns; go on with a plan, or without this cache")


def token_embeddings(base: PreTrainedModel, call: dict[str, Any]) -> Tensor:
    """Embeddings `[B, W, d]` of the tokens of a call of an LM's base model."""
    given: Tensor | None = call["inputs_embeds"]
    embedded: Tensor = base.get_input_embeddings()(call["input_ids"]) if given is None else given
    return embedded


def num_tokens(cache: Any) -> int:
    """How many tokens of each row a KV cache, or none, holds."""
    if cache is None:
        return 0
    columns = getattr(cache, "planlm_columns", None)
    length = int(cache.get_seq_length())
    return length if columns is None or length == 0 else int((columns[:length] % 2).sum())


class InsertedPlans:
    """What one call of the LM has inserted.

    Args:
        projected: `[S, d]` projected plans.
        segment_ids: `[B, W]` segment of each position, -1 for none.

    Attributes:
        begins: bool `[B, N]`, where each text has a plan in front; None where the text is not known, as with the plan
            inputs of a prepared batch.
        most: the largest number of plans that a row gets, where it is known.
    """

    begins: Tensor | None = None
    most: int | None = None

    def __init__(self, projected: Tensor, segment_ids: Tensor) -> None:
        self._projected, self._segment_ids = projected, segment_ids

    def run(self, base: PreTrainedModel, call: dict[str, Any]) -> Any:
        """Call an LM's base model with these plans; what it returns is that of the tokens' positions.

        Args:
            base: the base model.
            call: its arguments, `attention_mask`, `position_ids`, `past_key_values` and `use_cache` among them.

        Raises:
            InputError: a cache that was not filled with plans, or a mask of another kind than two-dimensional.
        """
        mask, positions, cache = call["attention_mask"], call["position_ids"], call["past_key_values"]
        documents: Documents | None = call.get("documents")
        if documents is not None or (isinstance(mask, Tensor) and mask.dtype == torch.int64 and mask.ndim == 4):
            mask = None  # of `within_documents`, and of the tokens' columns
        past = self._check(cache, mask)
        embeds = token_embeddings(base, call)
        width, segment_ids = embeds.shape[1], self._segment_ids.to(embeds.device)
        if self.begins is None or documents is not None:
            call = call | {"use_cache": bool(call["use_cache"])}
        if self.begins is None:
            begins = _begins(segment_ids)
        else:  # what is no text, as trained prompts, stands in front of it
            begins = nn.functional.pad(self.begins.to(embeds.device), (past + width - self.begins.shape[1], 0))
        is_cached = cache is not None or call["use_cache"] is not False
        layout = _Layout(begins[:, past:], is_cached, self.most)
        table = torch.cat((embeds.flatten(0, 1), self._projected.to(embeds), embeds.new_zeros(1, embeds.shape[2])))
        source = layout.source(segment_ids, len(table) - 1)
        inputs = table.index_select(0, source.flatten()).unflatten(0, source.shape)  # [B, X, d]
        numbers = torch.arange(past, past + width, device=embeds.device)[None] if positions is None else positions
        columns = None
        if is_cached:
            columns = torch.cat((getattr(cache, "planlm_columns", source.new_zeros(0)), layout.columns(past)))
            seen = torch.ones_like(begins) if mask is None else mask.to(begins)  # [B, N]
            seen = torch.stack((seen & begins, seen), dim=2).flatten(1)[:, columns]
        elif documents is not None:
            seen, call = call["attention_mask"], call | {"documents": layout.documents(documents)}
        elif mask is not None:
            seen = layout.spread(mask.to(begins))
        else:
            seen = _within_documents(base, inputs, layout, begins, positions)
        call = call | {"input_ids": None, "inputs_embeds": inputs, "attention_mask": seen}
        outputs = base(**call | {"position_ids": layout.spread(numbers.expand(begins[:, past:].shape))})
        if is_cached and outputs.past_key_values is not None:
            outputs.past_key_values.planlm_columns = columns
        return layout.tokens_of(outputs, columns)

    def _check(self, cache: Any, mask: Any) -> int:
        """Refuse what cannot be; the number of tokens in the cache."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise InputError("conditioning insert cannot be traced or exported: where plans stand depends on the text")
        if cache is not None:
            columns = getattr(cache, "planlm_columns", None)
            length = int(cache.get_seq_length())
            if getattr(cache, "is_compileable", False) or any(getattr(cache, "is_sliding", ())):
                raise InputError("past_key_values: conditioning insert needs a cache that grows; give a DynamicCache")
            if length and (columns is None or len(columns) != length or self.begins is None):
                raise InputError(
                    "past_key_values: filled or changed outside this model's calls on its text, so it is not known "
                    "where its plans are; pass the whole text without a cache, or use generate()"
                )
        past = num_tokens(cache)
        expected = past + self._segment_ids.shape[1]
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != expected):
            raise InputError(
                f"attention_mask: conditioning insert takes one of two dimensions, a number for each of the {expected} "
                "tokens"
            )
        return past


class _Layout:
    """Where the tokens of a call and the plans before them stand.

    Args:
        begins: bool `[B, W]`, the positions with a plan in front.
        aligned: the tokens stand in the same columns in all rows.
        most: the largest number of plans in a row; None: looked up, for which the host waits.
    """

    def __init__(self, begins: Tensor, aligned: bool, most: int | None) -> None:
        self._begins = begins
        width = begins.shape[1]
        self._slots = begins.any(dim=0, keepdim=True).expand_as(begins) if aligned else begins
        count = self._slots.cumsum(dim=1)
        self._tokens = torch.arange(width, device=begins.device) + count  # [B, W], column of each token
        if most is None or aligned:
            most = int(count[:, -1].max()) if count.numel() else 0
        # Few sizes where every row ends with columns to spare: libraries compile kernels for each shape that they meet.
        step = 1 if aligned else max(4, width // 8)
        self.width = width + -(-most // step) * step

    def source(self, segment_ids: Tensor, none: int) -> Tensor:
        """`[B, X]`, what each column holds: a token's number in `[B W]`, B W and a segment's number, or `none`."""
        rows, width = segment_ids.shape
        at = torch.arange(rows * width, device=segment_ids.device).view(rows, width)
        return self._placed(at, rows * width + segment_ids, none)

    def spread(self, values: Tensor) -> Tensor:
        """`[B, W]` values of the tokens, which plans share with the token behind them, as `[B, X]`; zero elsewhere."""
        return self._placed(values, values, 0)

    def first(self, begins: Tensor) -> Tensor:
        """`[B, X]`, the column in which what begins at some tokens, `[B, W]`, has its first one, the plan's before."""
        starts = self._placed(begins & ~self._begins, begins, 0).bool()
        at = torch.arange(self.width, device=begins.device)
        return at.where(starts, 0).cummax(dim=1).values

    def documents(self, documents: Documents) -> Documents:
        """Documents of the tokens with their plans; the last of a row has the columns to spare behind it."""
        first = (self._places - self._begins.long()).flatten()
        # Behind all of them is where empty documents are, and the end.
        first = nn.functional.pad(first, (0, 1), value=len(self._tokens) * self.width)
        offsets = first[documents.offsets.to(first.device, torch.int64)].int()
        return Documents(offsets, min(self.width, documents.longest + self.width - self._tokens.shape[1]))

    def columns(self, past: int) -> Tensor:
        """`[X]`, what the columns of a cache are: 2 t + 1 for the token t, 2 t for the plan before it."""
        token = 2 * torch.arange(past, past + self._tokens.shape[1], device=self._tokens.device)
        found = token.new_zeros(self.width).scatter_(0, self._tokens[0], token + 1)
        return found.scatter_add_(0, (self._tokens[0] - 1).clamp_min(0), token.where(self._slots[0], 0))

    def tokens_of(self, outputs: Any, columns: Tensor | None) -> Any:
        """The LM's outputs at the tokens; `columns` are those of the whole cache, if there is one."""
        outputs.last_hidden_state = self._picked(outputs.last_hidden_state)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(self._picked(states) for states in outputs.hidden_states)
        if outputs.attentions is not None:
            keys = self._tokens if columns is None else (columns % 2).nonzero()[:, 0].expand(len(self._tokens), -1)
            outputs.attentions = tuple(
                weights.take_along_dim(self._tokens[:, None, :, None], dim=2).take_along_dim(keys[:, None, None], dim=3)
                for weights in outputs.attentions
                if weights is not None
            )
        return outputs

    @property
    def _places(self) -> Tensor:
        """`[B, W]`, the column of each token, counted through all rows."""
        return torch.arange(len(self._tokens), device=self._tokens.device)[:, None] * self.width + self._tokens

    def _picked(self, states: Tensor) -> Tensor:
        """`[B, W, d]` of `[B, X, d]`."""
        at = self._places.to(states.device)
        return states.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, at.shape)

    def _placed(self, at_tokens: Tensor, at_plans: Tensor, elsewhere: int) -> Tensor:
        """`[B, X]` of `[B, W]`: values of the tokens, and of those that have a plan in front its own."""
        found = at_plans.new_full((len(at_plans), self.width + 1), elsewhere)
        found.scatter_(1, (self._tokens - 1).where(self._begins, self.width), at_plans)
        return found.scatter_(1, self._tokens, at_tokens)[:, : self.width]


def _begins(segment_ids: Tensor) -> Tensor:
    """bool `[B, W]`, the first position of each segment; ids rise within a row, -1 aside."""
    before = nn.functional.pad(segment_ids.cummax(dim=1).values[:, :-1], (1, 0), value=-1)
    return segment_ids > before


def _within_documents(
    base: PreTrainedModel, inputs: Tensor, layout: _Layout, begins: Tensor, positions: Tensor | None
) -> Any:
    """The attention mask of rows without one, which hold documents behind each other if their positions say so."""
    everything = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    if positions is None:
        return everything
    # transformers' rule: a document begins where positions do not go on by one.
    starts = nn.functional.pad(positions.expand(begins.shape).diff(dim=1) != 1, (1, 0), value=True)
    # Numbers that go on by one within a document, for those who find documents by that; the LM is given others.
    running = torch.arange(layout.width, device=inputs.device) - layout.first(starts)
    fast = document_starts(base, running)
    if fast is not None:
        return fast
    if is_flash_attention_requested(base.config):
        raise InputError("packed documents: conditioning insert needs attn_implementation='sdpa' or 'eager'")
    mask = document_masks(base, running)
    if mask is None:
        mask = create_causal_mask(base.config, inputs, None, None, running)
    return everything if mask is None else mask
