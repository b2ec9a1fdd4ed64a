"""Tokens of a long text, encoded in pieces: a tokenizer takes some 200 bytes for every byte of a text at once.

Each piece begins some way before the end of the one before, at a token of it, and the two are joined where they agree.
What a tokenizer decides depends on the text nearby, so that they do agree once what it does at the beginning of a text
(a space put before it, say) is past; where they do not, as nothing promises, the piece is made longer.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerFast

PIECE = 100_000
"""Characters encoded at a time: some 20 MB."""

OVERLAP = 2_000
"""Characters that two neighbours share; they have to agree on the middle half."""


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a text, without those that the tokenizer adds; control tokens spelled out in it are text.

    Args:
        tokenizer: a fast tokenizer.
        text: of any length; memory beyond the result does not grow with it.

    Returns:
        ids int32 [t] and the first character of each token, int32 [t].
    """
    ids, starts = [], []
    begin, size, first = 0, PIECE, 0
    while True:
        end = min(len(text), begin + size)
        piece_ids, offsets = _encode(tokenizer, text[begin:end], begin)  # [t], [t, 2]
        if end == len(text):
            ids.append(piece_ids[first:])
            starts.append(offsets[first:, 0].astype(np.int32))
            return np.concatenate(ids), np.concatenate(starts)
        joint = _joint(tokenizer, text, piece_ids, offsets, end)
        if joint is None:
            size *= 2
            continue
        cut, begin, next_first = joint
        ids.append(piece_ids[first:cut])
        starts.append(offsets[first:cut, 0].astype(np.int32))
        size, first = PIECE, next_first


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
