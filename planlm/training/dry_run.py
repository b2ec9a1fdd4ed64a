"""`planlm train --dry-run`: what a run would cost, from a few steps on real batches that leave nothing behind."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from planlm.config import TrainConfig
from planlm.training.groups import by_name, make_optimizer
from planlm.training.loop import Task, join, update
from planlm.training.prefetch import Prefetch
from planlm.training.throughput import peak_memory
from planlm.training.transport import Transport

STEPS = 3
"""The first ones set up memory, and on CUDA graphs; the last one is timed."""


@dataclass(frozen=True)
class Timed:
    """Steps that were run: seconds, labels and sequences of each, and the batches of the last one."""

    seconds: list[float]
    tokens: list[float]
    sequences: list[int]
    batches: list[Any]


def batches_of(task: Task) -> Prefetch:
    """The batches of a task as its loop has them; use as a context manager."""
    return Prefetch(task.loader, 2 * task.accumulate, Transport(task.device))


def timed_steps(
    task: Task,
    optimizer: torch.optim.Optimizer,
    batches: Prefetch,
    config: TrainConfig,
    *,
    step: int,
    least: int = 1,
    seconds: float = 0.0,
) -> Timed:
    """Run steps as if each were number `step`, with its batches and their loading.

    Args:
        task: what the loop trains.
        optimizer: over its groups.
        batches: of `batches_of`.
        config: the command's configuration.
        step: 0-based.
        least: so many steps at least.
        seconds: and until so much time has passed.
    """
    timed, began = Timed([], [], [], []), time.perf_counter()
    while len(timed.seconds) < least or time.perf_counter() - began < seconds:
        begin = time.perf_counter()
        timed.batches[:] = [next(batches) for _ in range(task.accumulate)]
        figures, skipped = update(task, optimizer, step, timed.batches, config)
        float(skipped)  # waits for the device
        timed.seconds.append(time.perf_counter() - begin)
        timed.tokens.append(float(figures["tokens"]))
        timed.sequences.append(sum(len(_own(batch).input_ids) for batch in timed.batches))
    return timed


def dry_run(task: Task, config: TrainConfig) -> dict[str, Any]:
    """Run `STEPS` steps as the last of the run, when all groups train, without a run directory.

    Returns:
        Shapes of this process's part of a batch, weights of each group and of what does not train, steps of the run,
        tokens predicted in it, seconds of a step and of all (without validation and checkpoints), peak memory in bytes.
    """
    optimizer = make_optimizer(task.groups, config.weight_decay)
    join(task, task.steps - 1, is_first=True)
    with batches_of(task) as batches:
        timed = timed_steps(task, optimizer, batches, config, step=task.steps - 1, least=STEPS)
    batch, seconds = _own(timed.batches[0]), timed.seconds[-1]
    return {
        "windows": list(batch.input_ids.shape),
        "segments": len(batch.actions),
        "sentences": list(batch.plan.sentence_embeddings.shape),
        **weights(task),
        "steps": task.steps,
        "tokens": round(sum(timed.tokens) / STEPS * task.steps),
        "seconds_per_step": seconds,
        "seconds": seconds * task.steps,
        "memory": peak_memory(),
    }


def weights(task: Task) -> dict[str, Any]:
    """Numbers of weights: `trained`, of each group, and `not_trained`."""
    own = {id(weight) for weight in by_name(task.groups).values()}
    return {
        "trained": {group.name: sum(weight.numel() for weight in group.parameters.values()) for group in task.groups},
        "not_trained": sum(weight.numel() for weight in task.model.model.parameters() if id(weight) not in own),
    }


def _own(batch: Any) -> Any:
    """A batch of the corpus; with --rehearsal they come in pairs, one of each corpus."""
    return batch[0] if isinstance(batch, tuple) else batch
