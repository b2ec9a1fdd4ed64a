"""What a run would take on GPUs: predicted from what was counted of it, stated rates and assumed shares of them.

A step takes its FLOPs at a share of what large matrix products reach, the bytes that its operators move at a share of
what large copies reach, and a gap for each launch; or, without CUDA graphs, as long as the host needs to ask for it.
Gradients are reduced while the backward pass runs. The two shares were fitted to six steps on an H200 (docs/gpu.md) and
are taken for other GPUs too; the memory is fitted to nothing:

| step, bf16, in graphs: joint, plain | measured, ms | here, ms | measured, GB | here, GB |
|---|---|---|---|---|
| GPT-2-small, 16 x 1,024 | 39.5, 37.7 | 37.9, 37.0 | 9.5, 9.0 | 8.7, 8.3 |
| SmolLM2-135M, 16 x 1,024 | 62.9, 60.6 | 61.4, 60.1 | 15.3, 14.8 | 14.8, 14.1 |
| OLMo-1B, 4 x 2,048 | 137.7, 135.8 | 143.4, 142.2 | 37.3, 36.5 | 36.1, 35.4 |

Llama's parts are counted as CUDA has them with Liger-Kernel installed (planlm/speedups/llama.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from planlm.config import TrainConfig
from planlm.training.graphs import would_capture

PRODUCTS, COPIES = 0.89, 0.88
"""Shares of the rates of large products and copies: fitted, see above."""

LAUNCH, HOST = 3e-6, 10e-6
"""Seconds between two kernels and for the first bytes of one; of the host for a launch: assumed (the host of that H200,
a virtual machine, took 44)."""

DISK = 1e9
"""Bytes/s of checkpoints: assumed."""

NODE = 8
"""GPUs of a node."""

CHUNK = 4096
"""Tokens whose logits are in memory at a time."""

NUMBERS = (1, 8, 64)


@dataclass(frozen=True)
class GPU:
    """A GPU's rates.

    Attributes:
        name: as it is known.
        bf16, fp32: FLOP/s of large matrix products.
        copies: bytes/s of a large copy, read and written.
        memory: bytes.
        within, between: bytes/s of an all-reduce for each GPU, in a node and between nodes.
    """

    name: str
    bf16: float
    fp32: float
    copies: float
    memory: float
    within: float
    between: float


GPUS = (
    GPU("A100 80GB", 268e12, 18.1e12, 1.75e12, 80e9, 235e9, 20e9),
    GPU("H100 80GB", 798e12, 52e12, 3.0e12, 80e9, 370e9, 40e9),
    GPU("H200 141GB", 771e12, 51e12, 4.26e12, 141e9, 370e9, 40e9),
)
"""H200: rates measured on one. H100: products and copies measured on one. Of the data sheet's elsewhere: .86 of A100's
products and copies, .78 of H100's float32. Links assumed: NVLink 3 and 4, 200 and 400 Gb/s a GPU between nodes."""


@dataclass(frozen=True)
class Work:
    """What a run asks of any device, counted.

    Attributes:
        trained, not_trained: weights.
        copied: weights of a frozen copy.
        largest_layer, outside_layers: weights.
        vocabulary: columns of the logits.
        launches: operators of a forward and backward pass.
        moved, moved_once: bytes that a pass moves, but for attention, for each token and beside that.
        kept, kept_once: bytes kept for the backward pass, in the same way.
        flops: of a token, forward and backward.
        sequences: of the whole run.
        steps: here.
        validation_batches: of a measurement.
    """

    trained: int
    not_trained: int
    copied: int
    largest_layer: int
    outside_layers: int
    vocabulary: int
    launches: float
    moved: float
    moved_once: float
    kept: float
    kept_once: float
    flops: float
    sequences: float
    steps: int
    validation_batches: int


def predict(work: Work, config: TrainConfig, gpu: GPU, number: int) -> dict[str, Any]:
    """A run on so many GPUs, each with a batch as large as `config`'s, over as many sequences in all.

    Returns:
        `batch_size`, `steps`, `seconds_per_step`, `seconds` (with validation and checkpoints), `tokens_per_second`
        (positions), `limit` (what a step waits for), `memory` (bytes a GPU), `memory_sharded` (with --shard).
    """
    # A corpus may have fewer sequences than a batch.
    batch = min(config.batch_size, math.ceil(work.sequences / (work.steps * config.accumulate)))
    tokens = batch * config.window
    parts = pass_seconds(work, gpu, tokens, fp32=config.precision == "fp32")
    graph = would_capture(config, number)
    host = 0.0 if graph else work.launches * HOST
    one, limit = max((sum(parts.values()), max(parts, key=lambda name: parts[name])), (host, "host"))
    reduced = reduce_seconds(work, gpu, number)
    last = one / 3 + max(2 * one / 3, reduced)  # backward takes two of three parts, and is what communication hides in
    if reduced > 2 * one / 3:
        limit = "communication"
    update = 40 * work.trained / (gpu.copies * COPIES)  # norm, clipping, AdamW: ten reads and writes in float32
    seconds = (config.accumulate - 1) * one + last + update
    steps = max(1, math.ceil(work.steps / number))
    validations = due(steps, config.validate_every)
    aside = validations * math.ceil(work.validation_batches / number) * one / 3
    aside += (due(steps, config.checkpoint_every) + validations) * 12 * work.trained / DISK
    return {
        "gpu": gpu.name,
        "gpus": number,
        "batch_size": batch * number,
        "steps": steps,
        "seconds_per_step": seconds,
        "seconds": steps * seconds + aside,
        "tokens_per_second": number * config.accumulate * tokens / seconds,
        "limit": limit,
        "memory": memory(work, tokens, keeps_gradients=graph or number > 1),
        "memory_sharded": None if number == 1 else memory(work, tokens, keeps_gradients=True, shards=number),
        "room": gpu.memory,
    }


def pass_seconds(work: Work, gpu: GPU, tokens: int, fp32: bool = False) -> dict[str, float]:
    """Seconds of a forward and backward pass over so many tokens, by what they go into."""
    return {
        "products": tokens * work.flops / ((gpu.fp32 if fp32 else gpu.bf16) * PRODUCTS),
        "memory traffic": (work.moved_once + tokens * work.moved) / (gpu.copies * COPIES),
        "launches": work.launches * LAUNCH,
    }


def reduce_seconds(work: Work, gpu: GPU, number: int) -> float:
    """Seconds of an all-reduce of the gradients, float32: each GPU sends and receives 2 (n - 1) / n of them."""
    rate = gpu.within if number <= NODE else gpu.between
    return 2 * (number - 1) / number * 4 * work.trained / rate


def memory(work: Work, tokens: int, *, keeps_gradients: bool, shards: int = 1) -> float:
    """Bytes of a GPU at the peak, the end of the forward pass or that of the backward one.

    Weights, gradients and two moments are float32. With `shards` they are divided, but for what is gathered at a time:
    what lies outside the layers, and two layers.
    """
    states = (4 * (work.trained + work.not_trained) + 8 * work.trained) / shards + 4 * work.copied
    gathered = 0 if shards == 1 else 4 * (work.outside_layers + 2 * work.largest_layer)
    gradients = 4 * work.trained / shards
    kept = work.kept_once + tokens * work.kept + 2 * min(tokens, CHUNK) * work.vocabulary
    return states + gathered + max(kept + (gradients if keeps_gradients else 0), gradients)


def due(steps: int, every: int | None) -> int:
    """How often something is done that is due after so many steps each, and after the last; None: never."""
    return 0 if every is None else math.ceil(steps / every)
