"""Start, some steps and end of a run, measured in a process of their own: `python -m planlm.training.measured`.

What it is to measure comes as JSON on stdin, what it found leaves as JSON on stdout. It does what `train` does, into a
folder that whoever started it deletes: the peak of memory is then the run's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch

from planlm.config import TrainConfig
from planlm.errors import InputError, MachineError, machine_failure
from planlm.files import to_json
from planlm.model.families import lm_layers
from planlm.model.loss import in_one_chunk
from planlm.model.modeling import PlanLMForCausalLM
from planlm.speedups.counted import parts_as_on_cuda
from planlm.terminal import silence_libraries
from planlm.training.counted import Counts, count
from planlm.training.dry_run import batches_of, timed_steps, weights
from planlm.training.groups import make_optimizer
from planlm.training.loop import Task, join, save
from planlm.training.run_directory import Run
from planlm.training.throughput import peak_memory
from planlm.training.train import Built, build, count_flops, finish
from planlm.training.validation import evaluating

WARM_UP, VALIDATION = 0.2, 0.1
"""Parts of the time for steps: of those that set up memory and kernels, and at most of validation, beside it."""

TOKENS = 512
"""Positions that are counted, and twice as many: the difference is what grows with the batch."""


def main() -> None:
    """Measure what stdin says; errors that are the user's or the machine's leave as JSON, too."""
    asked, found = json.loads(sys.stdin.read()), {}
    silence_libraries()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found = measure(TrainConfig(**asked["settings"]), asked["seconds"], asked["began"])
        except InputError as error:
            found = {"error": str(error), "status": error.status}
        except Exception as error:
            failure = machine_failure(error, {"--batch-size", "--window"})
            if failure is None:
                raise
            if "no space left" in failure:
                failure += f"; a checkpoint and a model go to {tempfile.gettempdir()}: set TMPDIR to a larger folder"
            found = {"error": failure, "status": MachineError.status}
    print(to_json(found))


def measure(config: TrainConfig, seconds: float, began: float) -> dict[str, Any]:
    """Start the run, take some steps of each phase, validate, write a checkpoint and end it.

    Args:
        config: of the run; its `out` is written to.
        seconds: for steps; one of each phase is taken, however long.
        began: when this process was asked for (Unix time).

    Returns:
        `start`, `warm_up` (list, a step each), `validation`, `checkpoint` and `end` in seconds; `phases`: `steps` of
        the run, `seconds` (list), `tokens` and `sequences` (means of a step) of each; `memory` (bytes); what was
        counted.
    """
    built = build(config)
    task, optimizer = built.task, make_optimizer(built.task.groups, config.weight_decay)
    with Run(config, built.identity, task.steps) as run, batches_of(task) as batches:
        found: dict[str, Any] = {"start": time.time() - began, "phases": []}
        limit = seconds * (1 - WARM_UP)
        for begin, end in phases(task):
            join(task, begin, is_first=True)
            if begin == 0:
                warm = timed_steps(task, optimizer, batches, config, step=0, seconds=seconds * WARM_UP)
                found["warm_up"] = warm.seconds
            timed = timed_steps(task, optimizer, batches, config, step=begin, seconds=limit / len(phases(task)))
            phase = {"steps": end - begin, "seconds": timed.seconds}
            means = {name: float(np.mean(getattr(timed, name))) for name in ("tokens", "sequences")}
            found["phases"].append(phase | means)
        found["validation"] = _validation(built, seconds * VALIDATION)
        clock = time.perf_counter()
        state = {"step": 1, "steps": task.steps, "tokens": 0, "skipped": 0, "loader": batches.position}
        save(task, run, optimizer, state, keep=1)
        found["checkpoint"] = time.perf_counter() - clock
        clock = time.perf_counter()
        finish(built.parallel, run, config, task.validation)
        found["end"] = time.perf_counter() - clock
    return found | {"memory": peak_memory(), "work": _work(built, config, timed.batches)}


def phases(task: Task) -> list[tuple[int, int]]:
    """Steps from one on to before another through which the same groups train."""
    starts = sorted({0} | {group.start for group in task.groups if group.start < task.steps})
    return list(itertools.pairwise([*starts, task.steps]))


@torch.no_grad()
def _validation(built: Built, seconds: float) -> float:
    """Seconds that a measurement on the validation split takes, after so many as there is time for batches of it."""
    if built.held_out is None:
        return 0.0
    began, done = time.perf_counter(), 0
    with evaluating(built.parallel.model):
        for batch in built.held_out:
            float(built.objective.losses(batch.to(built.task.device))[0])
            done += 1
            if time.perf_counter() - began > seconds:
                break
    return (time.perf_counter() - began) * built.held_out.num_batches / done


def _work(built: Built, config: TrainConfig, batches: list[Any]) -> dict[str, Any]:
    """What the run asks of any device: see `gpus.Work`.

    What is against forgetting runs the LM again: it counts as so many passes as it has FLOPs.
    """
    model: PlanLMForCausalLM = built.parallel.model  # type: ignore[assignment]
    model.to(built.task.device).train()
    small, large = _counts(built, config)
    step = large.tokens - small.tokens
    moved, kept = (
        (getattr(large, name) - getattr(small, name)) / step if step else getattr(small, name) / small.tokens
        for name in ("moved", "kept")
    )
    own = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
    flops = count_flops(model, config)(batches)
    passes = flops / count_flops(model, dataclasses.replace(config, kl=0.0))(own)
    layers = [sum(weight.numel() for weight in layer.parameters()) for layer in lm_layers(model.lm)]
    whole = sum(weight.numel() for weight in model.parameters())
    epochs, rest = divmod(built.task.steps * config.accumulate, built.loader.num_batches)
    return {
        **weights(built.task),
        "copied": whole if config.kl > 0 and config.lm_mode != "lora" else 0,
        "largest_layer": max(layers),
        "outside_layers": whole - sum(layers),
        "vocabulary": model.lm.get_output_embeddings().weight.shape[0],
        "launches": large.launches * passes,
        "moved": moved * passes,
        "moved_once": (small.moved - moved * small.tokens) * passes,
        "kept": kept,
        "kept_once": small.kept - kept * small.tokens,
        "flops": flops / sum(batch.input_ids.numel() for batch in own),
        "sequences": epochs * built.loader.num_items + min(rest * config.batch_size, built.loader.num_items),
        "steps": built.task.steps,
        "validation_batches": built.held_out.num_batches if built.held_out else 0,
    }


def _counts(built: Built, config: TrainConfig) -> list[Counts]:
    """Of two batches without what is against forgetting, as GPUs compute them: in bf16 unless that is not wanted."""
    if config.precision == "auto":
        built.objective.config = dataclasses.replace(config, precision="bf16")

    def counts(number: int) -> Counts:
        batch = built.loader.collate(np.arange(number)).to(built.task.device)
        built.parallel.model.zero_grad()  # or those of the batch before are added to
        with parts_as_on_cuda(), in_one_chunk():
            return count(lambda: built.objective.losses(batch)[0], batch.input_ids.numel())

    sequences = max(1, TOKENS // config.window)
    return [counts(min(times * sequences, built.loader.num_items)) for times in (1, 2)]


if __name__ == "__main__":
    main()
