"""Tokens of a text, counted by sentence through the tokenizer's character offsets.

A tokenizer takes some 200 bytes for every byte of a text at once, so a long text is encoded in pieces. Each begins some
way before the end of the one before, at a token of it, and the two are joined where they agree. What a tokenizer
decides depends on the text nearby, so that they do agree once what it does at the beginning of a text (a space put
before it, say) is past; where they do not, as nothing promises, the piece is made longer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

PIECE = 100_000
"""Characters encoded at a time: some 20 MB."""

OVERLAP = 2_000
"""Characters that two neighbours share; they have to agree on the middle half."""


def start_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids that the tokenizer itself puts before a text: one for Llama, none for GPT-2."""
    plain = tokenizer("a", add_special_tokens=False, verbose=False).input_ids
    framed = tokenizer("a", verbose=False).input_ids
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return list(framed[:start])
    return []


def tokenize(
    tokenizer: PreTrainedTokenizerFast, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise a whole text and count the tokens of each sentence.

    A token belongs to the sentence that holds its first character, and white space between two sentences belongs to
    the later one: so a token that holds any text of sentence i never counts to sentence i+1, whose plan knows
    sentence i.

    Args:
        tokenizer: a fast tokenizer.
        text: the document.
        spans: its n sentences, as `split_sentences` gives them; at least one.

    Returns:
        ids: int32, start token where the tokenizer adds one, then the whole text; no end token. Control tokens spelled
            out in the text are text.
        sentence_tokens: int64, n counts that add up to len(ids); a sentence within another one's token has 0.
    """
    ids, starts = encode(tokenizer, text)
    ends = np.array([end for _, end in spans[:-1]], dtype=np.int64)
    # Some normalisers report offsets that step back by a character; sentences must not.
    owners = np.maximum.accumulate(np.searchsorted(ends, starts, side="right")) if len(starts) else starts
    counts = np.bincount(owners, minlength=len(spans))
    prefix = start_tokens(tokenizer)
    counts[0] += len(prefix)
    return np.concatenate([np.array(prefix, dtype=np.int32), ids]), counts


def prompt_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Tokens of a text that is to be continued: as `tokenize` makes them, so without an end token."""
    return start_tokens(tokenizer) + list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a text, without those that the tokenizer adds; control tokens spelled out in it are text.

    Returns:
        ids int32 [t] and the first character of each token, int32 [t]; memory beyond those does not grow with the text.
    """
    ids, starts = [], []
    begin, size, first, end = 0, PIECE, 0, -1
    while end < len(text):
        end = min(len(text), begin + size)
        piece_ids, offsets = _encode(tokenizer, text[begin:end], begin)  # [t], [t, 2]
        joint = (len(piece_ids), end, 0) if end == len(text) else _joint(tokenizer, text, piece_ids, offsets, end)
        if joint is None:
            size *= 2
            continue
        cut, begin, next_first = joint
        ids.append(piece_ids[first:cut])
        starts.append(offsets[first:cut, 0].astype(np.int32))
        size, first = PIECE, next_first
    return np.concatenate(ids), np.concatenate(starts)


def _encode(tokenizer: PreTrainedTokenizerFast, text: str, begin: int) -> tuple[np.ndarray, np.ndarray]:
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return np.array(encoding["input_ids"], dtype=np.int32), offsets + begin


def _joint(
    tokenizer: PreTrainedTokenizerFast, text: str, ids: np.ndarray, offsets: np.ndarray, end: int
) -> tuple[int, int, int] | None:
    """Where a piece that ends at character `end` and the next one agree.

    Returns:
        How many tokens of this piece count, where the next piece begins, and its first token that counts; None where
        they do not agree.
    """
    bounds = _bounds(offsets)
    early = bounds[offsets[bounds, 0] >= end - OVERLAP]
    if not len(early):
        return None
    begin = int(offsets[early[0], 0])
    other_ids, other = _encode(tokenizer, text[begin:end], begin)
    low, high = begin + (end - begin) // 4, end - (end - begin) // 4
    mine, theirs = (np.flatnonzero((found[:, 0] >= low) & (found[:, 1] <= high)) for found in (offsets, other))
    if not np.array_equal(ids[mine], other_ids[theirs]) or not np.array_equal(offsets[mine], other[theirs]):
        return None
    middle = np.intersect1d(bounds, mine)
    if not len(middle):
        return None
    cut = int(middle[len(middle) // 2])
    return cut, begin, int(theirs[np.searchsorted(mine, cut)])


def _bounds(offsets: np.ndarray) -> np.ndarray:
    """Tokens that begin where all before them have ended: not the second byte of a character."""
    reached = np.concatenate([[-1], np.maximum.accumulate(offsets[:-1, 1])])
    return np.flatnonzero(offsets[:, 0] >= reached)
