"""What users ask of the plan: actions for the next sentences, banned ones and favoured ones.

Sizes: K actions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from planlm.config import GenerateConfig
from planlm.errors import InputError
from planlm.labels import find_action, show_action
from planlm.model.modeling import PlanLMForCausalLM
from planlm.selections import SELECTIONS


@dataclass(frozen=True)
class Steering:
    """What is asked of the plans of a text.

    Attributes:
        ban: actions that are never chosen.
        favour: nats added to the planner's logit, by action.
    """

    ban: list[int] = field(default_factory=list)
    favour: dict[int, float] = field(default_factory=dict)

    def bias(self, num_actions: int) -> Tensor | None:
        """float32 `[K]` to add to the planner's logits; None where nothing is."""
        if not self.ban and not self.favour:
            return None
        bias = torch.zeros(num_actions)
        for action, nats in self.favour.items():
            bias[action] = nats
        bias[self.ban] = -math.inf
        return bias

    def describe(self) -> dict[str, Any]:
        """`ban` and `favour`, ready for JSON."""
        return {"ban": self.ban, "favour": {str(action): nats for action, nats in self.favour.items()}}


def find_steering(config: GenerateConfig, model: PlanLMForCausalLM, selection: str) -> Steering:
    """`--ban` and `--favour` of a call.

    Raises:
        InputError: no such action, nats that are no number, every action banned, one banned and favoured, or a
            selection that asks no planner.
    """
    known = (model.config.num_actions, model.config.action_labels)
    ban = sorted({find_action(one, *known, "--ban") for one in _parts(config.ban)})
    favour: dict[int, float] = {}
    for one in _parts(config.favour):
        name, _, nats = one.rpartition(":")
        try:
            weight = float(nats)
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise InputError(f"--favour {one.strip()!r}: expected an action, a colon and nats, e.g. 12:2.0")
        favour[find_action(name, *known, "--favour")] = weight
    for option, given in (("--ban", ban), ("--favour", favour)):
        if given and not SELECTIONS[selection].asks_planner:
            raise InputError(f"{option}: selection {selection} asks no planner; choose soft or hard")
    if both := sorted(favour.keys() & ban):
        raise InputError(f"--ban and --favour both name the action {both[0]}; leave it out of one")
    if len(ban) == known[0]:
        raise InputError("--ban names every action; leave one at least")
    return Steering(ban, favour)


def find_plan(text: str | None, model: PlanLMForCausalLM, selection: str, ban: list[int], where: str) -> list[int]:
    """Actions asked for the next sentences, -1 where the planner chooses.

    Args:
        text: numbers, labels or `*`, with commas between.
        model: the joint model.
        selection: what it generates with.
        ban: actions that may not be asked for.
        where: what the error names, e.g. `--plan`.

    Raises:
        InputError: no such action, a banned one, or a selection under which nothing is planned.
    """
    if text is None:
        return []
    if not model.plans(selection):
        raise InputError(f"{where}: nothing is planned under selection {selection} of this model; leave it out")
    known = (model.config.num_actions, model.config.action_labels)
    plan = [-1 if one.strip() == "*" else find_action(one, *known, where) for one in text.split(",")]
    if banned := set(plan) & set(ban):
        shown = show_action(min(banned), known[1])
        raise InputError(f"{where}: action {shown} is banned by --ban; leave it out of one")
    return plan


def _parts(text: str | None) -> list[str]:
    return [] if text is None else text.split(",")
