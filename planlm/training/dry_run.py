"""`planlm train --dry-run`: what a run would cost, from a few steps on real batches that leave nothing behind."""

from __future__ import annotations

import time
from typing import Any

from planlm.config import TrainConfig
from planlm.training.groups import by_name, make_optimizer
from planlm.training.loop import Task, join, update
from planlm.training.prefetch import Prefetch
from planlm.training.throughput import peak_memory
from planlm.training.transport import Transport

STEPS = 3
"""The first ones set up memory, and on CUDA graphs; the last one is timed."""


def dry_run(task: Task, config: TrainConfig) -> dict[str, Any]:
    """Run `STEPS` steps as the last of the run, when all groups train, without a run directory.

    Returns:
        Shapes of this process's part of a batch, weights of each group and of what does not train, steps of the run,
        tokens predicted in it, seconds of a step and of all (without validation and checkpoints), peak memory in bytes.
    """
    optimizer = make_optimizer(task.groups, config.weight_decay)
    last = task.steps - 1
    join(task, last, is_first=True)
    tokens = 0.0
    with Prefetch(task.loader, 2 * task.accumulate, Transport(task.device)) as batches:
        for _ in range(STEPS):
            window = [next(batches) for _ in range(task.accumulate)]
            begin = time.perf_counter()
            figures, skipped = update(task, optimizer, last, window, config)
            float(skipped)  # waits for the device
            seconds = time.perf_counter() - begin
            tokens += float(figures["tokens"]) / STEPS
    batch = window[0][0] if isinstance(window[0], tuple) else window[0]  # with --rehearsal one of each corpus
    sizes = {group.name: sum(weight.numel() for weight in group.parameters.values()) for group in task.groups}
    trained = {id(weight) for weight in by_name(task.groups).values()}
    fixed = sum(weight.numel() for weight in task.model.model.parameters() if id(weight) not in trained)
    return {
        "windows": list(batch.input_ids.shape),
        "segments": len(batch.actions),
        "sentences": list(batch.plan.sentence_embeddings.shape),
        "trained": sizes,
        "not_trained": fixed,
        "steps": task.steps,
        "tokens": round(tokens * task.steps),
        "seconds_per_step": seconds,
        "seconds": seconds * task.steps,
        "memory": peak_memory(),
    }
