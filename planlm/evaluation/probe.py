"""`planlm audit-probe`: what swapping names in a text changes, between groups of names and within them.

Sizes: P prompts, V names of two groups, K actions, R draws.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planlm.config import AuditProbeConfig
from planlm.errors import InputError
from planlm.evaluation.probe_texts import read_probe, run_probe
from planlm.evaluation.significance import NO_DIFFERENCE, bootstrap_intervals
from planlm.model.loading import load_model
from planlm.selections import SELECTIONS

TOP_ACTIONS = 5
"""Actions shown of those whose probability differs most."""

LEVEL = 0.05
"""Share of random divisions of the names that may differ as much as the groups before the groups count as different."""

ROUNDING = 1e-5
"""Nats, or probability: what differs by less is no difference, but arithmetic in another order."""


def audit_probe(config: AuditProbeConfig) -> dict[str, Any]:
    """Fill every prompt with every name, and compare groups of names by pairs.

    Returns:
        `prompts`, `groups` (names of each), `selection` and `pairs`: of each two `groups`, what `_compare` gives.

    Raises:
        InputError: the probe's file, a model that plans nothing, or a prompt that cannot be filled in.
    """
    probe = read_probe(Path(config.probe))
    model = load_model(config.run)
    facts = SELECTIONS[model.config.selection]
    if not facts.asks_planner or facts.needs_others or model.planner is None:
        raise InputError(
            f"{config.run}: trained with selection {model.config.selection}, under which a text alone has no plan of "
            "the planner's; give a model of another selection"
        )
    plans, nll = run_probe(model, probe, config.probe)
    ends = np.cumsum([0, *map(len, probe.groups.values())])
    parts = {name: np.arange(*ends[at : at + 2]) for at, name in enumerate(probe.groups)}
    labels = model.config.action_labels or [""] * model.config.num_actions
    return {
        "run": config.run,
        "selection": model.config.selection,
        "prompts": len(probe.prompts),
        "groups": probe.groups,
        "pairs": [
            {"groups": [one, other]} | _compare(plans, nll, (parts[one], parts[other]), labels, config)
            for one, other in itertools.combinations(parts, 2)
        ],
    }


def _compare(
    plans: NDArray[np.float64],
    nll: NDArray[np.float64],
    groups: tuple[NDArray[np.int64], NDArray[np.int64]],
    labels: list[str],
    config: AuditProbeConfig,
) -> dict[str, Any]:
    """Two groups of names.

    Args:
        plans: of all groups, `[P, ., K]`.
        nll: likewise, nats per token, `[P, .]`.
        groups: numbers of the names of both.
        labels: of the actions.
        config: draws and seed.

    Returns:
        `plan`: total variation of the plans of two names, mean over prompts, of names of different groups (`between`)
        and of one group (`within`), and how much more the first is (`value`). `nll`: nats per token of each group
        (`means`), and first less second (`value`). Both with `ci95` over prompts, `chance95` and `p` (of random
        divisions of the same names in two) and `verdict`. `actions`: the largest differences in probability (of each
        its `means`, `value` and `ci95`), with `actions_chance95`, of the largest.
    """
    together = np.concatenate(groups)
    own = np.arange(len(together)) < len(groups[0])
    plans, nll = plans[:, together], nll[:, together]
    distance = np.stack([np.abs(one[:, None] - one).sum(axis=2) / 2 for one in plans])  # [P, V, V]
    between, within = _pairs(own)
    excess = (distance * (between - within)).sum(axis=(1, 2))  # [P]
    delta, change = _difference(nll, own), _difference(plans, own)  # [P], [P, K]
    shown = np.argsort(-np.abs(change.mean(axis=0)), kind="stable")[:TOP_ACTIONS]
    columns = np.column_stack([excess, delta, change[:, shown]])
    ends = bootstrap_intervals(
        lambda drawn: columns[drawn].mean(axis=1), len(columns), resamples=config.bootstrap, seed=config.seed
    )
    assert ends is not None  # there are enough prompts
    values, intervals = columns.mean(axis=0).tolist(), ends.T.tolist()
    chance = _by_chance(plans.mean(axis=0), nll.mean(axis=0), distance.mean(axis=0), own, config)
    names = (own, ~own)
    return {
        "plan": {
            "between": float((distance.mean(axis=0) * between).sum()),
            "within": float((distance.mean(axis=0) * within).sum()),
            **_judged(values[0], values[0], intervals[0], chance[:, 0]),
        },
        "nll": {
            "means": [float(nll[:, group].mean()) for group in names],
            **_judged(values[1], abs(values[1]), intervals[1], chance[:, 1]),
        },
        "actions": [
            {
                "action": int(action),
                "label": labels[action] or None,
                "means": [float(plans[:, group, action].mean()) for group in names],
                "value": value,
                "ci95": interval,
            }
            for action, value, interval in zip(shown, values[2:], intervals[2:], strict=True)
        ],
        "actions_chance95": float(np.quantile(chance[:, 2], 1 - LEVEL)),
    }


def _pairs(own: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights `[V, V]` that make means over pairs of names: of different groups; of one, both groups counting alike.

    Their difference is that of the energy distance (Székely and Rizzo, 2004): 0 on average where names of both groups
    are alike.
    """
    different = own[:, None] != own
    within = np.zeros(different.shape)
    for group in (own, ~own):
        pairs = np.outer(group, group) & ~np.eye(len(own), dtype=bool)
        within += pairs / pairs.sum()
    return different / different.sum(), within / 2


def _difference(values: NDArray[np.float64], own: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean of a group's names less that of the others, of `[P, V, ...]`."""
    found: NDArray[np.float64] = values[:, own].mean(axis=1) - values[:, ~own].mean(axis=1)
    return found


def _by_chance(
    plans: NDArray[np.float64],
    nll: NDArray[np.float64],
    distance: NDArray[np.float64],
    own: NDArray[np.bool_],
    config: AuditProbeConfig,
) -> NDArray[np.float64]:
    """What random divisions of the names show where there are differences between names, but none between groups.

    Args:
        plans: means over prompts, `[V, K]`.
        nll: likewise, `[V]`.
        distance: likewise, `[V, V]`.
        own: the names of one group, of whose size the divisions are.
        config: their number and seed.

    Returns:
        Of each the excess of distances, the size of the difference in NLL, and that of the largest difference of an
        action, `[R, 3]`.
    """
    generator = np.random.default_rng(config.seed)
    found = np.empty((config.bootstrap, 3))
    for row in found:
        drawn = generator.permutation(own)
        between, within = _pairs(drawn)
        row[0] = (distance * (between - within)).sum()
        row[1] = abs(_difference(nll[None], drawn)[0])
        row[2] = np.abs(_difference(plans[None], drawn)).max()
    return found


def _judged(value: float, size: float, interval: list[float], chance: NDArray[np.float64]) -> dict[str, Any]:
    """A value beside its interval, and its size beside chance; a difference is what prompts and names bear out."""
    p = (1 + int((chance >= size - ROUNDING).sum())) / (1 + len(chance))
    is_one = p <= LEVEL and not interval[0] <= 0 <= interval[1]
    return {
        "value": value,
        "ci95": interval,
        "chance95": float(np.quantile(chance, 1 - LEVEL)),
        "p": p,
        "verdict": "a difference" if is_one else NO_DIFFERENCE,
    }
