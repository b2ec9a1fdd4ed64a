"""What models have written, and what swapping names changes, as text for a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from planlm.labels import show_action
from planlm.report.tables import SHORT, align, ends, number
from planlm.terminal import visible

DISTANCES = (("total_variation", "total variation"), ("jensen_shannon", "Jensen-Shannon"))
"""Keys of the distances, and what they are called in front of readers."""

DRIFT = (
    "Drift: how far actions are from the corpus's, from 0 to 1. Chance: what as many sentences of the corpus itself "
    "show on average; at most: what 95 % of such samples stay below."
)

PROBE = (
    "The first group less the second: total variation of plans, perplexity. Chance: at most in 95 % of random "
    "divisions of the same names in two. A difference is one with p of at most .05 and an interval over prompts that "
    "leaves zero out."
)

_WIDTH = 80
_LABEL = 24


def format_audit(result: dict[str, Any]) -> str:
    """The tables of `audit`: models, drift, the actions that rose and fell, certainty and repetition.

    Args:
        result: as `planlm.evaluation.audit.audit` returns it.
    """
    damaged = len(result["damaged"])
    title = (
        f"{result['sentences']:,} sentences of {result['texts']:,} texts, beside the training split of "
        f"{result['corpus']}." + f" {damaged:,} damaged lines were left out." * bool(damaged)
    )
    models = [("model", "texts", "sentences")]
    models += [(one["model"][:16], f"{one['texts']:,}", f"{one['sentences']:,}") for one in result["models"]]
    parts = [textwrap.fill(title, _WIDTH, break_on_hyphens=False), align(models, left=(0,))]
    found = {name: one for name, one in result["drift"].items() if one is not None}
    if found:
        rows = [("", "", "distance", "chance", "at most", "p", "verdict")]
        for name, one in found.items():
            for at, (key, label) in enumerate(DISTANCES):
                cells = [number(one[key][what], 3) for what in ("chance", "chance95", "p")]
                value = number(one[key]["value"], 3)
                rows.append((name if at == 0 else "", label, value, *cells, one[key]["verdict"]))
        parts.append(f"{textwrap.fill(DRIFT, _WIDTH)}\n\n{align(rows, left=(0, 1, 6))}")
    parts += [_moved(name, one) for name, one in found.items()]
    return "\n\n".join([*parts, align(_figures(result), left=(0,))])


def _moved(name: str, drift: dict[str, Any]) -> str:
    """The actions that rose and fell."""
    rows = [("action", "texts", "corpus", "change", "95 %")]
    for one in drift["actions"]:
        shares = (number(one["texts"], 4), number(one["corpus"], 4), number(one["change"], 4, "+"))
        rows.append((_action(one), *shares, ends(one["ci95"], 4, "+")))
    title = (
        f"Actions that rose and fell most, {name}: shares of {drift['sentences']:,} sentences of {drift['texts']:,} "
        f"texts, 95 % intervals over texts. By chance none changes by more than {drift['change95']:.4f} (95 % of "
        "samples)."
    )
    return f"{textwrap.fill(title, _WIDTH)}\n\n{align(rows, left=(0,))}"


def _figures(result: dict[str, Any]) -> list[Sequence[str]]:
    """Rows of certainty and repetition, with the corpus's where it has them."""
    figures = [
        ("entropy of plans; corpus: of actions (nats)", result["entropy"], result["unigram_entropy"]),
        ("same action as the sentence before", result["same_action"], result["corpus_same_action"]),
        ("sentence stands in the text before", result["repeated"], None),
    ]
    figures += [(f"distinct {n}-grams of words in a text", one, None) for n, one in enumerate(result["distinct"], 1)]
    rows: list[Sequence[str]] = [("", "texts", "95 %", "corpus")]
    for label, figure, corpus in figures:
        if figure is not None:
            rows.append((label, number(figure["value"], 4), ends(figure["ci95"], 4), number(corpus, 4)))
    return rows


def format_probe(result: dict[str, Any]) -> str:
    """The tables of `audit-probe`, for each two groups.

    Args:
        result: as `planlm.evaluation.probe.audit_probe` returns it.
    """
    groups = ", ".join(f"{len(names)} {group}" for group, names in result["groups"].items())
    title = f"{result['prompts']:,} prompts, each with every name ({groups}), selection {result['selection']}. {PROBE}"
    return "\n\n".join([textwrap.fill(title, _WIDTH), *map(_pair, result["pairs"])])


def _pair(pair: dict[str, Any]) -> str:
    """What two groups of names differ in."""
    (one, other), plan, nll = pair["groups"], pair["plan"], pair["nll"]
    rows: list[Sequence[str]] = [("", "difference", "95 %", "chance", "p", "verdict")]
    for label, found in (("plan (variation)", plan), ("nats a token", nll)):
        cells = (number(found["value"], 4, "+"), ends(found["ci95"], 4, "+"), number(found["chance95"], 4))
        rows.append((label, *cells, number(found["p"], 3), SHORT.get(found["verdict"], found["verdict"])))
    first, second = (math.exp(mean) for mean in nll["means"])
    words = (
        f"The plans of two names of different groups differ by {plan['between']:.4f}, of one group by "
        f"{plan['within']:.4f}. Perplexity: {first:.2f} with {one}, {second:.2f} with {other}. By chance no action "
        f"differs by more than {pair['actions_chance95']:.4f} (95 % of divisions)."
    )
    actions: list[Sequence[str]] = [("action", one, other, "difference", "95 %")]
    for action in pair["actions"]:
        means = [number(mean, 4) for mean in action["means"]]
        actions.append((_action(action), *means, number(action["value"], 4, "+"), ends(action["ci95"], 4, "+")))
    title = f"== {one} and {other}"
    return "\n\n".join([title, align(rows, left=(0, 5)), textwrap.fill(words, _WIDTH), align(actions, left=(0,))])


def _action(found: dict[str, Any]) -> str:
    label = visible(" ".join((found["label"] or "").split()))
    label = label if len(label) <= _LABEL else f"{label[: _LABEL - 1]}…"
    return show_action(found["action"], {found["action"]: label})
