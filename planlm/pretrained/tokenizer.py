"""Tokenizers of causal LMs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from planlm.errors import InputError
from planlm.pretrained.names import loading, resolve


def load_tokenizer(name: str, **where: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a causal LM.

    Args:
        name: folder or hub name.
        where: transformers' `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`.

    Raises:
        InputError: it cannot be loaded, or it is a slow one, which knows no character offsets.
    """
    folder = resolve(name, "lm")
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
