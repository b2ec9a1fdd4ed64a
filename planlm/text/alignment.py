"""Tokens of a text, counted by sentence through the tokenizer's character offsets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from planlm.errors import InputError
from planlm.text.assets import loading, resolve
from planlm.text.pieces import encode


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a causal LM, by folder or hub name.

    Raises:
        InputError: it cannot be loaded, or it is a slow one, which knows no character offsets.
    """
    return read_tokenizer(resolve(name, "lm"), name)


def read_tokenizer(folder: str, name: str = "", **where: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or hub name that needs no more looking up.

    Args:
        folder: folder or hub name.
        name: how messages call it; default the same.
        where: transformers' `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`.

    Raises:
        InputError: as for `load_tokenizer`.
    """
    name = name or folder
    if Path(folder).is_dir():
        where["local_files_only"] = True
    with loading(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **where)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise InputError(f"{name}: its tokenizer gives no character offsets; give a model with a tokenizer.json")
        # Where there is no vocabulary transformers makes an empty tokenizer, which drops all text.
        if not tokenizer("A word.", add_special_tokens=False, verbose=False).input_ids:
            raise InputError(f"{name}: its tokenizer has no vocabulary; give a model with a tokenizer.json")
    for key in where:  # transformers would write them, a hub token too, into every folder the tokenizer is saved to
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of what decides how text becomes ids: vocabulary, merges, normalisation, pre- and post-processing.

    Truncation and padding, which calls change on the way, are left out; so are special tokens that are no part of the
    vocabulary ([PAD], say), since none is found in a text, unless the tokenizer itself puts them around one.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("truncation", None)
    rules.pop("padding", None)
    framing = json.dumps(rules.get("post_processor"))
    vocabulary = rules.get("model", {}).get("vocab", {})
    known = set(vocabulary) if isinstance(vocabulary, dict) else {entry[0] for entry in vocabulary}
    rules["added_tokens"] = [
        token
        for token in rules.get("added_tokens", [])
        if not token["special"] or token["content"] in known or json.dumps(token["content"]) in framing
    ]
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


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
) -> tuple[list[int], list[int]]:
    """`tokenize_array`, with lists in place of arrays."""
    ids, sentence_tokens = tokenize_array(tokenizer, text, spans)
    return ids.tolist(), sentence_tokens.tolist()


def tokenize_array(
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
