"""Sentence embeddings by any sentence-transformers model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planlm.precision import compute_dtype
from planlm.text.assets import loading, resolve
from planlm.text.weights import check_encoder, check_finite, checked_loads

BATCH_TOKENS = 4096
"""Tokens per forward pass, padding included: large enough to fill two cores (larger gained nothing when measured) and
small enough for the activations to stay in a few megabytes."""


class SentenceEncoder:
    """A sentence-transformers model with batches cut by tokens instead of sentences.

    Args:
        name: folder or hub name.
        precision: "fp32", "bf16" (weights and arithmetic of the transformer; pooling stays float32), or "auto": bf16
            where the processor has it.

    Raises:
        InputError: `name` cannot be loaded, brings code of its own, or its weights do not fit or are not finite.
    """

    def __init__(self, name: str, *, precision: str = "auto") -> None:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        self.name = name
        folder = resolve(name, "encoder")
        quiet = not logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            with loading(name, "encoder"):
                is_folder = Path(folder).is_dir()
                pooler = is_folder and check_encoder(name, Path(folder))
                with checked_loads(name, pooler=pooler):
                    self._model = SentenceTransformer(
                        folder,
                        trust_remote_code=False,
                        local_files_only=is_folder,
                        model_kwargs={"use_safetensors": True},
                    )
        finally:
            if not quiet:
                logging.enable_progress_bar()
        check_finite(name, self._model)
        self._model.eval()
        self.dim: int = self._model.get_embedding_dimension() or 0
        self._limit: int = self._model.max_seq_length or 512
        if compute_dtype(precision, self._model.device) == torch.bfloat16:
            self._model[0].to(torch.bfloat16)
            self._model[0].register_forward_hook(_to_float32)

    def encode(self, sentences: list[str]) -> np.ndarray:
        """Embed sentences.

        Args:
            sentences: n strings; what exceeds the model's maximum length is cut off, as the model's own settings say.

        Returns:
            float32 [n, dim], in the order of `sentences`; a row does not depend on the other sentences, but for
            rounding (a batch is as wide as its longest sentence).
        """
        embeddings = np.empty((len(sentences), self.dim), dtype=np.float32)
        if not sentences:
            return embeddings
        lengths = self._lengths(sentences)
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            size = max(1, BATCH_TOKENS // int(lengths[order[start]]))
            batch = order[start : start + size]
            embeddings[batch] = self._model.encode(
                [sentences[i] for i in batch], batch_size=len(batch), show_progress_bar=False
            )
            start += len(batch)
        return embeddings

    def _lengths(self, sentences: list[str]) -> np.ndarray:
        """Tokens of each sentence as the model will see them, at most its maximum length."""
        tokenizer = self._model.tokenizer
        encodings = tokenizer(
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
