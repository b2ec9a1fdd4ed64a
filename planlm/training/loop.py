"""The loop that pre-trains planners and trains joint models: steps, rates, clipping, checkpoints, log lines."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from planlm.config import LoopConfig
from planlm.distribution import any_rank, on_rank_zero, rank
from planlm.errors import InputError, MachineError
from planlm.progress import Progress
from planlm.signals import ending, handling
from planlm.training.checkpoint import (
    check_room,
    check_sound,
    newest_checkpoint,
    read_tensors,
    save_checkpoint,
    stored_shapes,
)
from planlm.training.figures import MAX_SKIPPED, Figures, Ledger, not_finite, read_on_cpu
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
from planlm.training.samples import Samples
from planlm.training.schedules import is_logged, learning_rate_factor
from planlm.training.throughput import Throughput, summary
from planlm.training.transport import Transport
from planlm.training.validation import Validation

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
            figures to log, "loss" and "tokens" (labels) among them, each summed or averaged over all ranks.
        flops: floating-point operations of a step over these batches; None where they are not counted.
        rate: FLOP/s of matrix products on this machine.
        validation: by default none.
        samples: by default none.
        keeps_gradients: gradients are set to zero after a step, and their memory stays theirs.
    """

    model: Parallel
    groups: list[ParameterGroup]
    loader: Loader
    accumulate: int
    steps: int
    backward: Callable[[int, list[Any]], Figures]
    flops: Callable[[list[Any]], float] | None = None
    rate: float = math.inf
    validation: Validation = field(default_factory=Validation)
    samples: Samples = field(default_factory=Samples)
    keeps_gradients: bool = False

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return next(iter(by_name(self.groups).values())).device


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
) -> tuple[Figures, Tensor]:
    """Forward, backward, clipping and the optimiser's update, once; leaves no gradients, and waits for no device.

    Returns:
        (figures of `Task.backward` with "grad_norm" before clipping and "lr" of each group; on the device 1 where loss
        or gradients are not finite, and nothing was updated, else 0).
    """
    seed_step(config.seed, step, rank())
    figures = task.backward(step, batches)
    norms = _clip(task.groups, config.max_grad_norm)
    rates = _set_rates(task, optimizer, step, config)
    skipped = not_finite([figures["loss"], *norms.values()], task.device)
    optimizer.found_inf = skipped  # type: ignore[attr-defined]  # which the fused update looks at on its device
    optimizer.step()
    optimizer.zero_grad(set_to_none=not task.keeps_gradients)
    return {**figures, "grad_norm": read_on_cpu(norms), "lr": rates}, skipped


def fit(task: Task, run: Run, config: LoopConfig) -> None:
    """Train `task` to its last step, from the newest sound checkpoint of `run` if there is one.

    With validation it may end before, and the model is left as it was at the best step.

    Raises:
        KeyboardInterrupt: after Ctrl-C or another signal that asks to end, once the state is in a checkpoint.
        MachineError: losses, gradients or weights are not finite, for many steps or at the end; or no checkpoint is
            sound or there is no room for one.
        InputError: the checkpoints are another run's.
    """
    optimizer = make_optimizer(task.groups, config.weight_decay)
    with Progress("train", task.steps) as progress, _StopSignal() as stop:
        ledger = _restore(task, run, optimizer, progress.line)
        first = ledger.step
        progress.start_at(first)
        with Prefetch(task.loader, 2 * task.accumulate, Transport(task.device)) as batches:
            throughput = Throughput(task.flops, task.rate, first, task.steps)
            for step in range(first, task.steps):
                if task.validation.is_over:
                    if step == first:
                        progress.line(f"over since step {step}, by --patience; set more to go on")
                    break
                join(task, step, is_first=step == first)
                with throughput.waiting():
                    window = [next(batches) for _ in range(task.accumulate)]
                figures, skipped = update(task, optimizer, step, window, config)
                done, before, note = step + 1, ledger.tokens, ""
                is_due = ledger.note(skipped=skipped, tokens=figures["tokens"])
                stopping = any_rank(stop.asked)
                logs = task.validation.is_due(done, task.steps) or is_logged(step, task.steps, config.log_every)
                saves = done % config.checkpoint_every == 0 or done == task.steps or stopping
                if is_due or logs or saves:  # all that the host ever waits for
                    figures = ledger.read(figures)
                throughput.step(ledger.tokens - before, window)
                with throughput.aside():
                    found = task.validation.after(done, task.steps)
                    task.samples.after(done, run, progress.line)
                if logs:
                    speed = throughput.metrics()
                    run.log({"step": done, **figures, **found, "tokens": ledger.tokens, **speed})
                    note = summary(figures["loss"], speed) + task.validation.note
                progress.advance(note=note)
                if ledger.skipped >= (1 if done == task.steps else MAX_SKIPPED):
                    raise MachineError(f"step {ledger.step}: {ledger.skipped} steps in a row skipped; {_START_ANEW}")
                if saves or task.validation.is_over or done == task.validation.best_step:
                    state = {"step": done, "steps": task.steps, "tokens": ledger.tokens, "skipped": ledger.skipped}
                    save(task, run, optimizer, state | {"loader": batches.position}, config.keep_checkpoints)
                if stopping:
                    raise KeyboardInterrupt(f"stopped after step {done}; continue with --resume")
    _take_best(task, run)


def join(task: Task, step: int, is_first: bool) -> None:
    """Have those groups train whose step has come."""
    if is_first or any(step == group.start for group in task.groups):
        for group in task.groups:
            for parameter in group.parameters.values():
                parameter.requires_grad_(step >= group.start)
        task.model.rewrap()


def _clip(groups: list[ParameterGroup], max_norm: float) -> dict[str, Tensor]:
    """Gradient norm of each group; scales each down to `max_norm` on its own, so that groups do not couple."""
    norms = {}
    for group in groups:
        parameters = [parameter for parameter in group.parameters.values() if parameter.grad is not None]
        if parameters:
            norms[group.name] = full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm))
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


def save(task: Task, run: Run, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint, of what is finite only: the newest one is what a run is taken up from.

    Raises:
        MachineError: weights or moments are not finite.
    """
    tensors = _tensors(task, optimizer)
    if any_rank(not all_finite(tensors.values())):
        raise MachineError(f"step {state['step']}: weights or moments are not finite; {_START_ANEW}")
    run.sync()
    starts = {group.name: group.start for group in task.groups}
    state |= {"starts": starts, "validation": task.validation.state_dict(), "identity": run.identity}
    save_checkpoint(run.checkpoints, tensors, state, keep)


def _take_best(task: Task, run: Run) -> None:
    """Give the model the weights of the best step, where there is one."""
    if step := task.validation.best_step:
        path = run.checkpoints / f"step-{step}"
        on_rank_zero(lambda: check_sound(path))
        read_tensors(path, _weights(task))


def _restore(task: Task, run: Run, optimizer: torch.optim.Optimizer, log: Callable[[str], None]) -> Ledger:
    """Continue from the newest sound checkpoint, or begin; what has been done."""
    parameters = by_name(task.groups)
    found = newest_checkpoint(run.checkpoints, log)
    if found is None:
        # With two moments a parameter; what is trained has no more than that. All of it is on this disk or on several.
        size = 3 * sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
        on_rank_zero(lambda: check_room(run.path, size))
        if run.last_line():
            log("no checkpoint had been written: training begins anew")
        run.forget_after(0)
        return Ledger(0, 0, 0, log)
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
    _keep_joined(task, state)
    if (before := state.get("steps", task.steps)) != task.steps:
        log(f"{task.steps} steps in all, {before} before: learning rates and fractions of training are of {task.steps}")
    return Ledger(int(state["step"]), int(state["tokens"]), int(state["skipped"]), log)


def _keep_joined(task: Task, state: dict[str, Any]) -> None:
    """Groups that have joined stay; a longer run would have some of them join later."""
    joined = {name: start for name, start in state.get("starts", {}).items() if start < state["step"]}
    task.groups[:] = [replace(group, start=joined.get(group.name, group.start)) for group in task.groups]


def _check_owner(path: Path, state: dict[str, Any], run: Run) -> None:
    if "identity" not in state:
        raise InputError(f"{path}: an older PlanLM's, without a record of what it was trained on; choose another --out")
    if changed := differences(state["identity"], run.identity):
        raise InputError(
            f"{path}: checkpoint of a run with another {', another '.join(changed)}; give that, or choose another --out"
        )


class _StopSignal(contextlib.ExitStack):
    """Turns signals that ask to end into a flag, so that a step is finished and saved; a later one acts at once.

    Not within `TWICE` seconds: torchrun passes on the signal that a scheduler sends to all processes, and the second
    would end a rank in the middle of a step whose all-reduce the others wait for.
    """

    TWICE = 2.0
    asked = False

    def __enter__(self) -> Self:
        self.enter_context(handling(self._ask, signal.SIGINT, *ending()))
        return self

    def _ask(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._since = True, now
        elif now - self._since > self.TWICE:
            raise KeyboardInterrupt
