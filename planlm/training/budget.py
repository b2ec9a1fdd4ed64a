"""`planlm plan-budget`: what a run would take, and what of that planning adds, here and on GPUs."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from planlm.config import PlanBudgetConfig, TrainConfig
from planlm.errors import InputError, MachineError
from planlm.files import to_json
from planlm.home import python_module
from planlm.model.loading import joint_config
from planlm.precision import device, device_name
from planlm.terminal import note
from planlm.training.gpus import GPUS, NUMBERS, Work, due, predict
from planlm.training.start import BUILT, BUILT_OR_DEFAULT
from planlm.training.train import check_settings

SECONDS = 40.0
"""For steps, of each of two processes; they start, write a checkpoint and end as well."""

OF_THE_PLAN = {
    "selection", "planner", "temperature", "top_k", "gumbel_scale", "conditioning", "codebook_per_layer", "gate",
    "freeze_planner", "unfreeze_planner_at", "unfreeze_codebook_at", "planner_loss", "planner_input",
    "planner_lm_layers", "oracle_mix", "oracle_mode", "oracle_schedule", "oracle_switch_at", "planner_lr",
    "codebook_lr",
}  # fmt: skip
"""Settings that a run without a plan does not have."""


def plan_budget(config: PlanBudgetConfig) -> dict[str, Any]:
    """Measure steps of a run here, with the plan and without, and extrapolate; predict GPUs from what was counted.

    Returns:
        `device`, `run` (settings that time depends on), `joint` and `plain` (see `extrapolated`; `plain` is None where
        the run itself has no plan), `gpus` (rows of `predict`, with what planning `adds`).

    Raises:
        InputError: as `train` does.
        MachineError: a measurement ended by itself, as where memory does not suffice.
    """
    joint = _train_config(config)
    check_settings(joint)
    plain = without_plan(joint)
    runs = [(joint, "with the plan"), (plain, "without it")] if plain else [(joint, "the run")]
    measured = [_measure(one, name) for one, name in runs]
    works = [work_of(one["work"]) for one in measured]
    rows = []
    for gpu in GPUS:
        for number in NUMBERS:
            found = [predict(work, joint, gpu, number) for work in works]
            adds = found[0]["seconds"] / found[1]["seconds"] - 1 if plain else None
            rows.append({**found[0], "adds": adds})
    here = [extrapolated(one, joint) for one in measured]
    return {
        "device": device_name(device()),
        "lm": joint.lm,
        "selection": joint.selection,
        "compared_with": plain.selection if plain else None,
        "window": joint.window,
        "batch_size": joint.batch_size * joint.accumulate,
        "steps": measured[0]["work"]["steps"],
        "joint": here[0],
        "plain": here[1] if plain else None,
        "gpus": rows,
    }


def without_plan(config: TrainConfig) -> TrainConfig | None:
    """The same run of the LM without a plan, or, where all of the LM is frozen, with one that is always the same.

    None where the run itself is that.
    """
    selection = "fixed" if config.lm_mode == "freeze" else "none"
    if config.selection in ("none", "fixed"):
        return None
    # A joint model keeps how it was built, and what holds the same plan everywhere is built as what plans.
    is_built = selection == "fixed" or joint_config(config.lm or "") is not None
    left_out = OF_THE_PLAN - {*BUILT, *BUILT_OR_DEFAULT} if is_built else OF_THE_PLAN
    kept = {name: value for name, value in vars(config).items() if name not in left_out}
    return TrainConfig(**kept, selection=selection)


def extrapolated(measured: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """A run's time from what `measured.measure` found, part by part.

    The steps of a phase take as long as those measured, in proportion to their sequences: an epoch's last batch has
    fewer. What a first step takes longer is counted once.

    Returns:
        `parts`: seconds of "start", "steps" (each phase by the step it begins with), "validation", "checkpoints" and
        "end"; their sum `seconds`, with `error` (standard error times two; None where only one step was measured),
        `phases` (steps, mean and quantiles of a step's seconds, how many were measured), `memory`, weights by group.
    """
    work, phases = measured["work"], []
    share = work["sequences"] / work["steps"]  # sequences of a mean step
    variance, steps, begin = 0.0, {}, 0
    for phase in measured["phases"]:
        seconds, scale = phase["seconds"], share / phase["sequences"]
        mean, count = statistics.fmean(seconds) * scale, len(seconds)
        variance += (phase["steps"] * scale * statistics.stdev(seconds)) ** 2 / count if count > 1 else math.nan
        phases.append(
            {
                "from": begin,
                "steps": phase["steps"],
                "seconds_per_step": mean,
                "least": min(seconds) * scale,
                "most": max(seconds) * scale,
                "measured": count,
                "tokens_per_second": phase["tokens"] / statistics.fmean(seconds),
            }
        )
        steps[f"steps from {begin:,} on"] = phase["steps"] * mean
        begin += phase["steps"]
    validations = due(begin, config.validate_every)
    first = statistics.fmean(measured["phases"][0]["seconds"])
    parts = {
        "start": measured["start"] + max(0.0, sum(measured["warm_up"]) - first * len(measured["warm_up"])),
        **steps,
        "validation": validations * measured["validation"],
        # Of a measurement each better one is a checkpoint, too; all are taken for that.
        "checkpoints": (due(begin, config.checkpoint_every) + validations) * measured["checkpoint"],
        "end": measured["end"],
    }
    return {
        "seconds": sum(parts.values()),
        "error": None if math.isnan(variance) else 2 * math.sqrt(variance),
        "parts": parts,
        "phases": phases,
        "memory": measured["memory"],
        "trained": work["trained"],
        "not_trained": work["not_trained"],
    }


def work_of(found: dict[str, Any]) -> Work:
    """What was counted, all groups together."""
    return Work(**{**found, "trained": sum(found["trained"].values())})


def _train_config(config: PlanBudgetConfig) -> TrainConfig:
    """The run, as `train` has it."""
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    own = {name: getattr(config, name) for name in names}
    unused = {"tracker": None, "sample_every": None, "sample_prompts": None}
    return TrainConfig(**own | {"json": False, "resume": False, "dry_run": False, **unused})


def _measure(config: TrainConfig, name: str) -> dict[str, Any]:
    """What `measured.measure` finds of a run, in a process of its own."""
    note(f"measuring here {name}: some steps, a checkpoint")
    with tempfile.TemporaryDirectory(prefix="planlm-") as folder:
        settings = vars(config) | {"out": str(Path(folder) / "run")}
        done = subprocess.run(
            python_module("planlm.training.measured"),
            input=to_json({"settings": settings, "seconds": SECONDS, "began": time.time()}),
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # an interruption is this process's, which ends that one
        )
    if done.returncode != 0:
        signal = f"was killed by signal {-done.returncode}: too little memory?" if done.returncode < 0 else "failed"
        raise MachineError(f"the measurement {name} {signal}; see above, or try a smaller --batch-size")
    found: dict[str, Any] = json.loads(done.stdout)
    if "error" in found:
        raise (InputError if found["status"] == InputError.status else MachineError)(found["error"])
    return found
