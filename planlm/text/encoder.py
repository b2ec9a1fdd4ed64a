"""Sentence embeddings by any sentence-transformers model."""

from __future__ import annotations

import functools
import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planlm.errors import InputError
from planlm.precision import compute_dtype
from planlm.pretrained.names import absolute, loading, resolve
from planlm.pretrained.weights import check_finite, checked_encoder

BATCH_TOKENS = 4096
"""Tokens per forward pass, padding included: large enough to fill two cores (larger gained nothing when measured) and
small enough for the activations to stay in a few megabytes."""

TOGETHER = 1_000_000
"""Characters whose tokens are counted and batches sorted at a time: a tokenizer takes 200 bytes for each."""

LONGEST = 20_000
"""Characters of a sentence that are looked at: more than the maximum length of an encoder leaves of any text."""

CHARACTERS_PER_TOKEN = 4
"""Where a model has no tokenizer of transformers', as word embeddings: fewer than most have, for small batches."""


class SentenceEncoder:
    """A sentence-transformers model with batches cut by tokens instead of sentences.

    Never changes: copies of a model share one, it is pickled by name and precision, and threads may use it at once.

    Args:
        name: folder or hub name.
        precision: "fp32", "bf16" (weights and arithmetic of transformers; pooling and other modules stay float32), or
            "auto": bf16 where the processor has it.

    Raises:
        InputError: `name` cannot be loaded, brings code of its own, or its weights do not fit or are not finite.
    """

    def __init__(self, name: str, *, precision: str = "auto") -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Router, Transformer
        from transformers import PreTrainedTokenizerBase

        self.name = name
        self._reduced = (absolute(name), precision)
        self._lock = threading.Lock()  # fast tokenizers refuse to be used by two threads
        folder = Path(resolve(name, "encoder"))
        with loading(name, "encoder"):
            with checked_encoder(name, folder if folder.is_dir() else None):
                self._model = SentenceTransformer(
                    str(folder),
                    trust_remote_code=False,
                    local_files_only=folder.is_dir(),
                    model_kwargs={"use_safetensors": True},
                )
            check_finite(name, self._model)
        self._model.eval().float().requires_grad_(False)
        if compute_dtype(precision, self._model.device) == torch.bfloat16:
            for module in self._model.modules():
                if isinstance(module, Transformer):
                    module.to(torch.bfloat16)
                    module.register_forward_hook(_to_float32)
        first = self._model[0]
        self._routed: dict[str, str] = {}
        if isinstance(first, Router) and first.default_route is None and not first.route_mappings:
            routes = list(first.sub_modules)  # a corpus is what documents are
            self._routed = {"task": "document" if "document" in routes else routes[0]}
        tokenizer = getattr(first, "tokenizer", None)
        self._tokenizer = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
        with loading(name, "encoder"):
            limit = self._model.max_seq_length
            self._limit = int(limit) if limit and limit < 1 << 20 else 1 << 20  # some say None, infinity or 10**30
            self.dim: int = self._dim(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> SentenceEncoder:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        name, precision = self._reduced
        return functools.partial(SentenceEncoder, precision=precision), (name,)

    def _dim(self, name: str) -> int:
        """The width of embeddings, asked of the model itself: not all modules say it, and some say it wrong.

        Asked with one word of each of several scripts: without a vocabulary all of them are the same unknown token.
        Models with a list of words instead of a tokenizer may know none of them.
        """
        rows = self._embed(["cat", "7", "的", "и"])
        if self._tokenizer is not None and (not np.isfinite(rows).all() or (rows == rows[0]).all()):
            raise InputError(f"{name}: does not tell words apart; copy the encoder again, with its tokenizer")
        return int(rows.shape[1])

    def encode(self, sentences: list[str]) -> np.ndarray:
        """Embed sentences.

        Args:
            sentences: n strings; what exceeds the model's maximum length is cut off, as the model's own settings say.

        Returns:
            float32 [n, dim], in the order of `sentences`; a row does not depend on the other sentences, but for
            rounding (a batch is as wide as its longest sentence), nor on the thread or on its autocast.
        """
        embeddings = np.empty((len(sentences), self.dim), dtype=np.float32)
        read = np.cumsum([0, *map(len, sentences)])[:-1]  # characters before each sentence
        parts = np.split(np.arange(len(sentences)), np.flatnonzero(np.diff(read // TOGETHER)) + 1)
        with self._lock:
            for part in parts if sentences else ():
                lengths = self._lengths([sentences[i][:LONGEST] for i in part])
                order = np.argsort(-lengths, kind="stable")  # sentences of similar length together
                while len(order):
                    size = max(1, BATCH_TOKENS // int(lengths[order[0]]))
                    batch, order = part[order[:size]], order[size:]
                    embeddings[batch] = self._embed([sentences[i][:LONGEST] for i in batch])
        return embeddings

    def _embed(self, batch: list[str]) -> np.ndarray:
        """float32 [batch, dim]."""
        with torch.autocast(self._model.device.type, enabled=False):  # the caller's is of its thread
            rows: np.ndarray = self._model.encode(
                batch, batch_size=len(batch), show_progress_bar=False, convert_to_numpy=True, **self._routed
            )
        return rows

    def _lengths(self, sentences: list[str]) -> np.ndarray:
        """Tokens of each sentence as the model will see them, at most its maximum length; estimated where need be."""
        if self._tokenizer is None:
            lengths = np.array([len(sentence) // CHARACTERS_PER_TOKEN for sentence in sentences])
            return np.clip(lengths, 1, self._limit)
        encodings = self._tokenizer(
            sentences, truncation=True, max_length=self._limit, return_attention_mask=False, verbose=False
        )
        return np.array([max(1, len(ids)) for ids in encodings["input_ids"]])


def _to_float32(module: torch.nn.Module, arguments: Any, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hand float32 to pooling and whatever follows: means and norms over bf16 would be bf16."""
    return {
        key: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in features.items()
    }


def encoder_fingerprint(name: str) -> str:
    """What an encoder is, wherever it lies: sha256 of a folder's files in hexadecimal, or the name on the hub."""
    if not Path(name).is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(Path(name).rglob("*")):
        inside = path.relative_to(name)
        if path.is_file() and path.suffix != ".md" and not any(part.startswith(".") for part in inside.parts):
            with open(path, "rb") as file:
                digest.update(f"{inside.as_posix()}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()
