"""What the commands take that run others."""

from __future__ import annotations

from dataclasses import dataclass

from planlm.config.base import CommandConfig, option, required
from planlm.settings import BATCH, COUNT, NOT_NEGATIVE, SEED, TOKENS, count


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig(CommandConfig):
    """The whole path on real text and real pre-trained weights, from packages alone."""

    out: str = option("quickstart", "folder for everything that is made")
    seed: int = option(0, "seed of every stage", limit=SEED)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(CommandConfig):
    """Rows, seeds and LMs of a YAML file to tables and curves; goes on after any interruption."""

    file: str = required("YAML file that describes the experiment (docs/experiments.md)", positional=True)
    corpus: str | None = option(None, "prepared corpus; default: what the file says")
    out: str | None = option(None, "folder for everything that is made; default: experiment-NAME")
    jobs: int | None = option(
        None,
        "cells at a time, which share the cores; default: one for each GPU, or for each core with 4 GB of memory",
        limit=count(4096),
    )


@dataclass(frozen=True, kw_only=True)
class SmallLMConfig(CommandConfig):
    """A GPT-2 that the quickstart or an experiment trains itself; of the quickstart's size unless told otherwise."""

    vocabulary: int = option(4096, "tokens of its byte-level BPE tokenizer", limit=count(1_000_000))
    layers: int = option(4, "transformer layers", limit=count(256))
    width: int = option(256, "channels; heads have 64", limit=count(65_536))
    context: int = option(1024, "positions (tokens)", limit=TOKENS)
    window: int = option(64, "tokens per window", limit=TOKENS)
    batch_size: int = option(16, "windows per step", limit=BATCH)
    steps: int = option(800, "optimiser steps", limit=COUNT)
    lr: float = option(2e-3, "peak learning rate; linear warm-up and decay", limit=NOT_NEGATIVE)
    seed: int = option(0, "seed of the weights and the order of windows", limit=SEED)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(CommandConfig):
    """What this machine offers."""
