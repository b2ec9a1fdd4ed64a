"""What the commands that write text, and read what was written, take."""

from __future__ import annotations

from dataclasses import dataclass

from planlm.config.base import CommandConfig, option, required
from planlm.selections import SELECTIONS
from planlm.settings import BATCH, FRACTION_NOT_ZERO, SAMPLING, SEED


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(CommandConfig):
    """Continue a text, planning each sentence."""

    run: str = required("run directory of train, or a model folder", positional=True)
    prompt: str = required("text to continue")
    max_new_tokens: int = option(128, "tokens to generate", limit=BATCH)
    temperature: float = option(0.8, "sampling temperature; 0: greedy", limit=SAMPLING)
    top_p: float = option(0.95, "nucleus of the sampling distribution", limit=FRACTION_NOT_ZERO)
    plan: str | None = option(
        None,
        "actions to follow for the next sentences, by number or label, * where the planner chooses: 12,*,birth and "
        "family; afterwards the planner decides",
    )
    ban: str | None = option(None, "actions never to choose, by number or label: 12,birth and family")
    favour: str | None = option(None, "actions to choose more often, with the nats to add to their logits: 12:2.0,7:1")
    selection: str | None = option(
        None, "selection to generate with; default: the one trained with", choices=tuple(SELECTIONS)
    )
    show_plan: bool = option(False, "print each sentence with its most probable actions")
    audit: str | None = option(None, "JSON-lines file: one object per sentence with its plan")
    seed: int = option(0, "seed of the sampling", limit=SEED)
