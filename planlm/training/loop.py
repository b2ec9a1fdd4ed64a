"""The loop that pre-trains planners and trains joint models: steps, rates, clipping, checkpoints, log lines."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from planlm.config import LoopConfig
from planlm.distribution import any_rank, on_rank_zero, rank
from planlm.errors import InputError, MachineError
from planlm.progress import Progress
from planlm.signals import handling
from planlm.training.checkpoint import (
    check_room,
    check_sound,
    newest_checkpoint,
    read_tensors,
    save_checkpoint,
    stored_shapes,
)
from planlm.training.groups import (
    ParameterGroup,
    all_finite,
    blank_state,
    by_name,
    make_optimizer,
    optimizer_tensors,
)
from planlm.training.parallel import Parallel, full_tensor, seed_step
from planlm.training.prefetch import Loader, Prefetch
from planlm.training.run_directory import Run, differences
from planlm.training.schedules import is_logged, learning_rate_factor
from planlm.training.throughput import Throughput, summary
from planlm.training.validation import Validation

MAX_SKIPPED = 10
"""Steps in a row with a non-finite gradient after which training stops: the state is beyond recovery by skipping."""

_START_ANEW = "training has diverged: start again with a lower --lr (and others, where set) and another --out"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the loop trains.

    Attributes:
        model: its parameters outside `groups` stay as they are.
        groups: what trains.
        loader: batches.
        accumulate: batches per step.
        steps: steps in all.
        backward: given a step's number and batches, runs forward and backward over all of them and returns the
            metrics to log, "loss" and "tokens" (labels) among them, each summed or averaged over all ranks.
        flops: floating-point operations of a step over these batches; None where they are not counted.
        rate: FLOP/s of matrix products on this machine.
        validation: by default none.
    """

    model: Parallel
    groups: list[ParameterGroup]
    loader: Loader
    accumulate: int
    steps: int
    backward: Callable[[int, list[Any]], dict[str, float]]
    flops: Callable[[list[Any]], float] | None = None
    rate: float = math.inf
    validation: Validation = field(default_factory=Validation)


def num_steps(config: LoopConfig, num_batches: int, accumulate: int = 1) -> int:
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


def update(
    task: Task, optimizer: torch.optim.Optimizer, step: int, batches: list[Any], config: LoopConfig
) -> tuple[dict[str, Any], bool]:
    """Forward, backward, clipping and the optimiser's update, once; leaves no gradients.

    Returns:
        (metrics of `Task.backward` with "grad_norm" before clipping and "lr" of each group; whether loss and gradients
        are finite: else nothing is updated).
    """
    seed_step(config.seed, step, rank())
    metrics = task.backward(step, batches)
    norms = _clip(task.groups, config.max_grad_norm)
    rates = _set_rates(task, optimizer, step, config)
    is_finite = math.isfinite(metrics["loss"]) and all(map(math.isfinite, norms.values()))
    if is_finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**metrics, "grad_norm": norms, "lr": rates}, is_finite


def fit(task: Task, run: Run, config: LoopConfig) -> None:
    """Train `task` to its last step, from the newest sound checkpoint of `run` if there is one.

    With validation it may end before, and the model is left as it was at the best step.

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
            throughput = Throughput(task.flops, task.rate, first, task.steps)
            for step in range(first, task.steps):
                if task.validation.is_over:
                    break
                if step == first or any(step == group.start for group in task.groups):
                    for group in task.groups:
                        for parameter in group.parameters.values():
                            parameter.requires_grad_(step >= group.start)
                    task.model.rewrap()
                with throughput.waiting():
                    window = [next(batches) for _ in range(task.accumulate)]
                metrics, is_finite = update(task, optimizer, step, window, config)
                skipped = 0 if is_finite else skipped + 1
                if skipped:
                    progress.line(f"step {step + 1}: non-finite loss or gradient, step skipped ({skipped} in a row)")
                done = step + 1
                num_tokens = int(metrics["tokens"])
                tokens += num_tokens
                throughput.step(num_tokens, window)
                stopping = any_rank(stop.asked)
                note = ""
                with throughput.aside():
                    found = task.validation.after(done, task.steps)
                if found or is_logged(step, task.steps, config.log_every):
                    speed = throughput.metrics()
                    run.log({"step": done, **metrics, **found, "tokens": tokens, **speed})
                    note = summary(metrics["loss"], speed) + task.validation.note
                progress.advance(note=note)
                if skipped >= (1 if done == task.steps else MAX_SKIPPED):
                    raise MachineError(f"step {done}: {skipped} steps in a row skipped; {_START_ANEW}")
                is_end = done == task.steps or task.validation.is_over or done == task.validation.best_step
                if done % config.checkpoint_every == 0 or is_end or stopping:
                    state = {"step": done, "tokens": tokens, "skipped": skipped, "loader": batches.position}
                    _save(task, run, optimizer, state, config.keep_checkpoints)
                if stopping:
                    raise KeyboardInterrupt(f"stopped after step {done}; continue with --resume")
    _take_best(task, run)


def _clip(groups: list[ParameterGroup], max_norm: float) -> dict[str, float]:
    """Gradient norm of each group; scales each down to `max_norm` on its own, so that groups do not couple."""
    norms = {}
    for group in groups:
        parameters = [parameter for parameter in group.parameters.values() if parameter.grad is not None]
        if parameters:
            norms[group.name] = float(full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm)))
    return norms


def _set_rates(task: Task, optimizer: torch.optim.Optimizer, step: int, config: LoopConfig) -> dict[str, float]:
    rates = {
        group.name: group.lr
        * learning_rate_factor(step, task.steps, start=group.start, warmup=config.warmup, schedule=config.schedule)
        for group in task.groups
    }
    for settings in optimizer.param_groups:
        settings["lr"] = rates[settings["group"]]
    return rates


def _weights(task: Task) -> dict[str, Tensor]:
    return {f"model/{name}": parameter.detach() for name, parameter in by_name(task.groups).items()}


def _tensors(task: Task, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds, under its names there."""
    return _weights(task) | {
        f"optimizer/{name}": value for name, value in optimizer_tensors(task.groups, optimizer).items()
    }


def _save(task: Task, run: Run, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint, of what is finite only: the newest one is what a run is taken up from.

    Raises:
        MachineError: weights or moments are not finite.
    """
    tensors = _tensors(task, optimizer)
    if any_rank(not all_finite(tensors.values())):
        raise MachineError(f"step {state['step']}: weights or moments are not finite; {_START_ANEW}")
    run.sync()
    state |= {"validation": task.validation.state_dict(), "identity": run.identity}
    save_checkpoint(run.checkpoints, tensors, state, keep)


def _take_best(task: Task, run: Run) -> None:
    """Give the model the weights of the best step, where there is one."""
    if step := task.validation.best_step:
        path = run.checkpoints / f"step-{step}"
        on_rank_zero(lambda: check_sound(path))
        read_tensors(path, _weights(task))


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
    if {name.removeprefix("model/"): shape for name, shape in stored.items() if name.startswith("model/")} != {
        name: parameter.shape for name, parameter in parameters.items()
    }:
        raise InputError(f"{run.checkpoints}: checkpoint of another model; choose another --out")
    names = [name.removeprefix("optimizer/") for name in stored if name.startswith("optimizer/")]
    blank_state(task.groups, optimizer, names)
    tensors = _tensors(task, optimizer)
    read_tensors(path, tensors)
    if any_rank(not all_finite(tensors.values())):
        raise MachineError(f"{path}: weights or moments are not finite; {_START_ANEW}")
    task.loader.load_state_dict(state["loader"])
    task.validation.load_state_dict(state.get("validation", {}))
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


class _StopSignal(contextlib.ExitStack):
    """Turns SIGINT and SIGTERM into a flag, so that a step is finished and saved; a later one acts at once.

    Not within `TWICE` seconds: torchrun passes on the signal that a scheduler sends to all processes, and the second
    would end a rank in the middle of a step whose all-reduce the others wait for.
    """

    TWICE = 2.0
    asked = False

    def __enter__(self) -> Self:
        self.enter_context(handling(self._ask, signal.SIGINT, signal.SIGTERM))
        return self

    def _ask(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._since = True, now
        elif now - self._since > self.TWICE:
            raise KeyboardInterrupt
