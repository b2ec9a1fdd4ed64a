"""Random numbers that belong to sentences: the same on whichever rank and in whatever batch they are drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from planlm.corpus.batches import PlanBatch


def uniform_by_sentence(batch: PlanBatch, seed: int, step: int) -> Tensor:
    """A number from 0 to 1 for each segment of a batch, `[S]` float64, that seed, step and sentence decide.

    Segments of one sentence, in several windows, have the same.
    """
    document, sentence = batch.sentences()
    state = torch.zeros_like(document)
    for key in (seed, step, document, sentence):
        state = _splitmix64(state + key)
    return _right(state, 11).double() * 2.0**-53


def _splitmix64(state: Tensor) -> Tensor:
    """SplitMix64's output function (Steele, Lea and Flood 2014, fig. 15), in arithmetic modulo 2^64."""
    state = state - 0x61C8864680B583EB  # + 0x9E3779B97F4A7C15
    state = (state ^ _right(state, 30)) * -0x40A7B892E31B1A47  # * 0xBF58476D1CE4E5B9
    state = (state ^ _right(state, 27)) * -0x6B2FB644ECCEEE15  # * 0x94D049BB133111EB
    return state ^ _right(state, 31)


def _right(state: Tensor, bits: int) -> Tensor:
    """A shift that brings zeros in, which torch's of signed numbers does not."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
