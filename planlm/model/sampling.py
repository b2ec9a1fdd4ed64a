"""Sampling with random numbers that belong to the text.

A sampled token is the arg-max of `log p + G` with standard Gumbel noise G (the Gumbel-max trick: an exact draw from p).
The noise of a token is a function of seed, text and position, so that a text does not depend on the batch it is written
in, and texts under several plans can share their noise: they differ by the plan alone.

Sizes: B texts, W columns of a batch's prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

_FURTHER = {
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}
"""What else of a model's generation settings narrows what is drawn from, in transformers' order."""

_OFF = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


class SharedGumbel(LogitsProcessor):
    """Adds to the logits of each text the noise of its number and position.

    Args:
        seed: of all noise.
        keys: of each text its number, and of several that share a number which it is.
        width: columns W of the batch so far.
        step: called with the number of texts at every token.
        written: tokens of each text that were generated before; default none.
        attempts: rows of each text, side by side, each with noise of its own; the first has that of a single one.
            Default one.
    """

    def __init__(
        self,
        seed: int,
        keys: Sequence[tuple[int, int]],
        width: int,
        step: Callable[[int], None] | None = None,
        written: Sequence[int] | None = None,
        attempts: Sequence[int] | None = None,
    ) -> None:
        begun, counts = written or [0] * len(keys), attempts or [1] * len(keys)
        rows = zip(keys, begun, counts, strict=True)
        self._rows = [(*key, begin, one) for key, begin, count in rows for one in range(count)]
        self._seed, self._width, self._step = seed, width, step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[B, V]` with noise, float32."""
        new = input_ids.shape[1] - self._width
        if self._step is not None:
            self._step(len(scores))
        noise = np.stack(
            [
                gumbel((self._seed, text, begin + new, sample, *((0, attempt) if attempt else ())), scores.shape[1])
                for text, sample, begin, attempt in self._rows
            ]
        )
        return scores.float() + torch.from_numpy(noise).to(scores.device)


def gumbel(key: Sequence[int], size: int) -> np.ndarray:
    """Standard Gumbel noise for the tokens of a vocabulary, float32 [size]; zeros that end a key change nothing."""
    # Of float64: in float32 an exponential variate of 0, whose noise is infinite, would come up now and then.
    variates = np.random.default_rng(key).standard_exponential(size)
    noise: np.ndarray = -np.log(variates, out=variates)
    return noise.astype(np.float32)


def sampled(settings: GenerationConfig, temperature: float, top_p: float, noise: SharedGumbel) -> LogitsProcessorList:
    """What makes greedy decoding a draw by `noise`; nothing at temperature 0.

    Args:
        settings: the model's own, of which top-h, min-p, typical-p, epsilon and eta cut-offs count.
        temperature: of the distribution.
        top_p: its nucleus.
        noise: of the texts.
    """
    processors = LogitsProcessorList()
    if temperature == 0:
        return processors
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(temperature))
    if settings.top_h is not None:
        processors.append(TopHLogitsWarper(settings.top_h))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    for name, warper in _FURTHER.items():
        if (value := getattr(settings, name)) is not None and value != _OFF.get(name):
            processors.append(warper(value))
    processors.append(noise)
    return processors


def left_padded(texts: Sequence[list[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 `[B, W]` each, of texts that end in the last column."""
    width = max(map(len, texts))
    before = [width - len(text) for text in texts]
    ids = [[padding] * count + text for count, text in zip(before, texts, strict=True)]
    mask = torch.arange(width) >= torch.tensor(before)[:, None]
    return torch.tensor(ids, device=device), mask.long().to(device)
