"""The loop that pre-trains planners and trains joint models: steps, rates, clipping, checkpoints, log lines."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from planlm.config import PlannerConfig, TrainConfig
from planlm.errors import InputError, MachineError
from planlm.progress import Progress
from planlm.training.checkpoint import load_checkpoint, save_checkpoint
from planlm.training.groups import ParameterGroup, make_optimizer, optimizer_tensors, restore_optimizer
from planlm.training.run import Run
from planlm.training.schedules import learning_rate_factor

MAX_SKIPPED = 10
"""Steps in a row with a non-finite gradient after which training stops: the state is beyond recovery by skipping."""


class Loader(Protocol):
    """Batches of one epoch at a time, with a position that can be stored."""

    epoch: int

    @property
    def num_batches(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


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
            figures to log ("loss" among them).
        num_tokens: tokens in a batch, for the throughput.
    """

    model: nn.Module
    groups: list[ParameterGroup]
    loader: Loader
    accumulate: int
    steps: int
    backward: Callable[[int, list[Any]], dict[str, float]]
    num_tokens: Callable[[Any], int]


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


def fit(task: Task, run: Run, config: PlannerConfig | TrainConfig) -> None:
    """Train `task` to its last step, from the newest sound checkpoint of `run` if there is one.

    Raises:
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is in a checkpoint.
        MachineError: gradients stay non-finite.
    """
    optimizer = make_optimizer(task.groups, config.weight_decay)
    with Progress("train", task.steps) as progress, _StopSignal() as stop:
        first, tokens = _restore(task, run, optimizer, progress.line)
        progress.advance(first)
        batches = _stream(task.loader)
        skipped, before = 0, tokens
        started = time.monotonic()
        for step in range(first, task.steps):
            for group in task.groups:
                if step in (first, group.start):
                    for parameter in group.parameters.values():
                        parameter.requires_grad_(step >= group.start)
            window = [next(batches) for _ in range(task.accumulate)]
            figures = task.backward(step, window)
            norms = _clip(task.groups, config.max_grad_norm)
            rates = _set_rates(task, optimizer, step, config)
            if all(math.isfinite(norm) for norm in norms.values()):
                optimizer.step()
                skipped = 0
            else:
                skipped += 1
                progress.line(f"step {step + 1}: non-finite gradient, step skipped ({skipped} in a row)")
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            tokens += sum(task.num_tokens(batch) for batch in window)
            progress.advance(note=f"loss {figures['loss']:.4f}")
            if done % config.log_every == 0 or done in (1, task.steps):
                seconds = time.monotonic() - started
                speed = {"tokens_per_second": round((tokens - before) / seconds, 1), "seconds": round(seconds, 2)}
                run.log({"step": done, "tokens": tokens, **figures, "grad_norm": norms, "lr": rates, **speed})
            if done % config.checkpoint_every == 0 or done == task.steps or stop.asked or skipped >= MAX_SKIPPED:
                _save(task, run, optimizer, {"step": done, "tokens": tokens}, config.keep_checkpoints)
            if stop.asked:
                raise KeyboardInterrupt(f"stopped after step {done}; continue with --resume")
            if skipped >= MAX_SKIPPED:
                raise MachineError(f"step {done}: {skipped} non-finite gradients in a row; lower the learning rates")


def _stream(loader: Loader) -> Iterator[Any]:
    """Batches without end, epoch after epoch, from the loader's position on."""
    while True:
        yield from loader
        loader.epoch += 1


def _clip(groups: list[ParameterGroup], max_norm: float) -> dict[str, float]:
    """Gradient norm of each group; scales each down to `max_norm` on its own, so that groups do not couple."""
    norms = {}
    for group in groups:
        parameters = [parameter for parameter in group.parameters.values() if parameter.grad is not None]
        if parameters:
            norms[group.name] = float(nn.utils.clip_grad_norm_(parameters, max_norm))
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


def _save(task: Task, run: Run, optimizer: torch.optim.Optimizer, done: dict[str, int], keep: int) -> None:
    parameters = {name: parameter for group in task.groups for name, parameter in group.parameters.items()}
    tensors: dict[str, torch.Tensor] = {f"model/{name}": parameter for name, parameter in parameters.items()}
    tensors |= {f"optimizer/{name}": value for name, value in optimizer_tensors(task.groups, optimizer).items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    save_checkpoint(run.checkpoints, tensors, {**done, "loader": task.loader.state_dict()}, keep)


def _restore(task: Task, run: Run, optimizer: torch.optim.Optimizer, log: Callable[[str], None]) -> tuple[int, int]:
    """Continue from the newest sound checkpoint; returns the numbers of steps done and of tokens seen."""
    found = load_checkpoint(run.checkpoints, log)
    if found is None:
        run.forget_after(0)
        return 0, 0
    tensors, state = found
    parameters = {name: parameter for group in task.groups for name, parameter in group.parameters.items()}
    stored = {name[6:]: value for name, value in tensors.items() if name.startswith("model/")}
    if {name: value.shape for name, value in stored.items()} != {
        name: value.shape for name, value in parameters.items()
    }:
        raise InputError(f"{run.checkpoints}: checkpoint of another model; choose another --out")
    with torch.no_grad():
        for name, value in stored.items():
            parameters[name].copy_(value)
    restore_optimizer(
        task.groups, optimizer, {name[10:]: value for name, value in tensors.items() if name.startswith("optimizer/")}
    )
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    task.loader.load_state_dict(state["loader"])
    run.forget_after(state["step"])
    log(f"resumed after step {state['step']}")
    return int(state["step"]), int(state["tokens"])


class _StopSignal:
    """Turns SIGINT and SIGTERM into a flag, so that a step is finished and saved; a second one acts at once."""

    def __enter__(self) -> _StopSignal:
        self.asked = False
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
