"""The loop that pre-trains planners and trains joint models: steps, rates, clipping, checkpoints, log lines."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planlm.config import PlannerConfig, TrainConfig
from planlm.distribution import any_rank, on_rank_zero, rank, world_size
from planlm.errors import InputError, MachineError
from planlm.progress import Progress
from planlm.training.checkpoint import check_room, newest_checkpoint, read_tensors, save_checkpoint, stored_shapes
from planlm.training.groups import (
    ParameterGroup,
    all_finite,
    blank_state,
    by_name,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from planlm.training.parallel import Parallel, full_tensor, seed_step
from planlm.training.prefetch import Loader, Prefetch
from planlm.training.run_directory import Run, differences
from planlm.training.schedules import learning_rate_factor
from planlm.training.throughput import Watch, summary

MAX_SKIPPED = 10
"""Steps in a row with a non-finite gradient after which training stops: the state is beyond recovery by skipping."""

_START_ANEW = "training has diverged: start again with a lower --lr (and others, where set) and another --out"


@dataclass(frozen=True)
class Task:
    """What the loop trains.

    Attributes:
        model: its parameters outside `groups` stay as they are.
        groups: what trains.
        loader: batches.
        accumulate: batches per step.
        steps: steps in all.
        backward: given a step's number and batches, runs forward and backward over all of them and returns the
            figures to log, "loss" and "tokens" (labels) among them, each of all processes together.
        flops: floating-point operations of a step over these batches; None where they are not counted.
        rate: FLOP/s of matrix products on this machine.
    """

    model: Parallel
    groups: list[ParameterGroup]
    loader: Loader
    accumulate: int
    steps: int
    backward: Callable[[int, list[Any]], dict[str, float]]
    flops: Callable[[list[Any]], float] | None = None
    rate: float = math.inf


def num_steps(config: PlannerConfig | TrainConfig, num_batches: int, accumulate: int = 1) -> int:
    """Optimiser steps of a run: `--steps`, or as many as `--epochs` takes.

    Raises:
        InputError: the corpus has no batch, or fewer than one step results.
    """
    steps = config.steps if config.steps is not None else math.ceil(config.epochs * num_batches / accumulate)
    if num_batches == 0 or steps < 1:
        raise InputError(
            f"nothing to train on: {num_batches} batches, {steps} steps; set --steps or --epochs, or a larger corpus"
        )
    return steps


def check_batch_size(batch_size: int) -> None:
    """Refuse batches that cannot be shared: `--batch-size` counts what all processes take together.

    Raises:
        InputError: fewer items than processes.
    """
    if batch_size < world_size():
        raise InputError(f"--batch-size {batch_size}: {world_size()} processes share it; set at least that")


@dataclass(frozen=True)
class Update:
    """What one step did.

    Attributes:
        figures: of `Task.backward`.
        norms: gradient norm of each group before clipping.
        rates: learning rate of each group.
        taken: False where a gradient was not finite, and nothing was changed.
    """

    figures: dict[str, float]
    norms: dict[str, float]
    rates: dict[str, float]
    taken: bool


def update(
    task: Task, optimizer: torch.optim.Optimizer, step: int, batches: list[Any], config: PlannerConfig | TrainConfig
) -> Update:
    """Forward, backward, clipping and the optimiser's update, once; leaves no gradients."""
    seed_step(config.seed, step, rank())
    figures = task.backward(step, batches)
    norms = _clip(task.groups, config.max_grad_norm)
    rates = _set_rates(task, optimizer, step, config)
    taken = math.isfinite(figures["loss"]) and all(map(math.isfinite, norms.values()))
    if taken:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Update(figures, norms, rates, taken)


def fit(task: Task, run: Run, config: PlannerConfig | TrainConfig) -> None:
    """Train `task` to its last step, from the newest sound checkpoint of `run` if there is one.

    Raises:
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is in a checkpoint.
        MachineError: losses, gradients or weights are not finite, for many steps or at the end; or no checkpoint is
            sound or there is no room for one.
        InputError: the checkpoints are another run's.
    """
    optimizer = make_optimizer(task.groups, config.weight_decay)
    with Progress("train", task.steps) as progress, _StopSignal() as stop:
        first, tokens, skipped = _restore(task, run, optimizer, progress.line)
        progress.start_at(first)
        with Prefetch(task.loader, ahead=2 * task.accumulate) as batches:
            watch = Watch(task.flops, task.rate, first, task.steps)
            for step in range(first, task.steps):
                if step == first or any(step == group.start for group in task.groups):
                    for group in task.groups:
                        for parameter in group.parameters.values():
                            parameter.requires_grad_(step >= group.start)
                    task.model.rewrap()
                with watch.waiting():
                    window = [next(batches) for _ in range(task.accumulate)]
                result = update(task, optimizer, step, window, config)
                skipped = 0 if result.taken else skipped + 1
                if skipped:
                    progress.line(f"step {step + 1}: non-finite loss or gradient, step skipped ({skipped} in a row)")
                done = step + 1
                seen = int(result.figures["tokens"])
                tokens += seen
                watch.step(seen, window)
                stopping = any_rank(stop.asked)
                if done % config.log_every == 0 or done in (1, task.steps):
                    speed = watch.figures()
                    line = {"step": done, **result.figures, "tokens": tokens, "grad_norm": result.norms}
                    run.log({**line, "lr": result.rates, **speed})
                    progress.advance(note=summary(result.figures["loss"], speed))
                else:
                    progress.advance()
                if skipped >= (1 if done == task.steps else MAX_SKIPPED):
                    raise MachineError(f"step {done}: {skipped} steps in a row skipped; {_START_ANEW}")
                if done % config.checkpoint_every == 0 or done == task.steps or stopping:
                    state = {"step": done, "tokens": tokens, "skipped": skipped, "loader": batches.position}
                    _save(task, run, optimizer, state, config.keep_checkpoints)
                if stopping:
                    raise KeyboardInterrupt(f"stopped after step {done}; continue with --resume")


def _clip(groups: list[ParameterGroup], max_norm: float) -> dict[str, float]:
    """Gradient norm of each group; scales each down to `max_norm` on its own, so that groups do not couple."""
    norms = {}
    for group in groups:
        parameters = [parameter for parameter in group.parameters.values() if parameter.grad is not None]
        if parameters:
            norms[group.name] = float(full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm)))
    return norms


def _set_rates(
    task: Task, optimizer: torch.optim.Optimizer, step: int, config: PlannerConfig | TrainConfig
) -> dict[str, float]:
    rates = {
        group.name: group.lr
        * learning_rate_factor(step, task.steps, start=group.start, warmup=config.warmup, schedule=config.schedule)
        for group in task.groups
    }
    for settings in optimizer.param_groups:
        settings["lr"] = rates[settings["group"]]
    return rates


def _save(task: Task, run: Run, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint, of what is finite only: the newest one is what a run is taken up from.

    Raises:
        MachineError: weights or moments are not finite.
    """
    tensors: dict[str, Tensor] = {f"model/{name}": parameter for name, parameter in by_name(task.groups).items()}
    tensors |= {f"optimizer/{name}": value for name, value in optimizer_tensors(task.groups, optimizer).items()}
    if any_rank(not all_finite(list(tensors.values()))):
        raise MachineError(f"step {state['step']}: weights or moments are not finite; {_START_ANEW}")
    run.sync()
    save_checkpoint(run.checkpoints, tensors, {**state, "identity": run.identity}, keep)


def _restore(
    task: Task, run: Run, optimizer: torch.optim.Optimizer, log: Callable[[str], None]
) -> tuple[int, int, int]:
    """Continue from the newest sound checkpoint; the numbers of steps done, tokens seen and steps skipped just now."""
    parameters = by_name(task.groups)
    found = newest_checkpoint(run.checkpoints, log)
    if found is None:
        # With two moments a parameter; what is trained has no more than that. All of it is on this disk or on several.
        size = 3 * sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
        on_rank_zero(lambda: check_room(run.path, size))
        if run.last_line():
            log("no checkpoint had been written: training begins anew")
        run.forget_after(0)
        return 0, 0, 0
    path, state = found
    on_rank_zero(lambda: _check_owner(path, state, run))
    stored = stored_shapes(path)
    if {name[6:]: shape for name, shape in stored.items() if name.startswith("model/")} != {
        name: parameter.shape for name, parameter in parameters.items()
    }:
        raise InputError(f"{run.checkpoints}: checkpoint of another model; choose another --out")
    moments = blank_state(task.groups, [name[10:] for name in stored if name.startswith("optimizer/")])
    read_tensors(
        path,
        {f"model/{name}": parameter.detach() for name, parameter in parameters.items()}
        | {f"optimizer/{name}": value for name, value in moments.items()},
    )
    if any_rank(not all_finite([*parameters.values(), *moments.values()])):
        raise MachineError(f"{path}: weights or moments are not finite; {_START_ANEW}")
    restore_optimizer(task.groups, optimizer, moments)
    task.loader.load_state_dict(state["loader"])
    run.forget_after(state["step"])
    log(f"resumed after step {state['step']}")
    return int(state["step"]), int(state["tokens"]), int(state["skipped"])


def _check_owner(path: Path, state: dict[str, Any], run: Run) -> None:
    if "identity" not in state:
        raise InputError(f"{path}: an older PlanLM's, without a record of what it was trained on; choose another --out")
    if changed := differences(state["identity"], run.identity):
        raise InputError(
            f"{path}: checkpoint of a run with another {', another '.join(changed)}; give that, or choose another --out"
        )


class _StopSignal:
    """Turns SIGINT and SIGTERM into a flag, so that a step is finished and saved; a later one acts at once.

    Not within `TWICE` seconds: whoever signals all processes of a job, torchrun too, which passes the signal on, would
    tear a rank out of the step that the others wait in.
    """

    TWICE = 2.0

    def __enter__(self) -> _StopSignal:
        self.asked = False
        # Python hands signals to its main thread alone, and lets no other ask for them.
        is_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: whoever embeds Python handles the signal, and nothing here can put that back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _ask(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._since = True, now
        elif now - self._since > self.TWICE:
            raise KeyboardInterrupt
