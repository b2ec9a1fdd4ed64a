"""What the commands that write text, and read what was written, take."""

from __future__ import annotations

from dataclasses import dataclass

from planlm.config.base import CommandConfig, option, required
from planlm.selections import SELECTIONS
from planlm.settings import BATCH, FRACTION_NOT_ZERO, SAMPLING, SEED, count


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(CommandConfig):
    """Continue a text, or every text of a file, planning each sentence."""

    run: str = required("run directory of train, or a model folder", positional=True)
    prompt: str | None = option(None, "text to continue")
    prompts: str | None = option(
        None,
        "file of texts to continue, in place of --prompt: .txt, one a line, or .jsonl, objects with prompt and, where "
        "wanted, plan and id",
    )
    out: str | None = option(
        None, "JSON-lines file for the results of --prompts, one for each in their order; default: printed"
    )
    batch_size: int = option(32, "texts generated at once; no text depends on it", limit=BATCH)
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
    attempts: int = option(
        1,
        "write a sentence whose action --plan asks for, or --num-plans has drawn, so many times, and keep the first "
        "that carries it, else the nearest",
        limit=BATCH,
    )
    num_plans: int | None = option(
        None,
        "so many continuations, each sentence's action drawn from the planner's distribution; the best is the one that "
        "the model finds most probable by the token; default: one, with no action drawn",
        limit=count(10_000),
    )
    selection: str | None = option(
        None, "selection to generate with; default: the one trained with", choices=tuple(SELECTIONS)
    )
    show_plan: bool = option(False, "print each sentence with its most probable actions")
    stream: bool = option(
        False, "print the text on stderr while it is written, each sentence on a line behind its action"
    )
    audit: str | None = option(
        None, "JSON-lines file to append to: a line for each sentence, its plan and what made it"
    )
    seed: int = option(0, "seed of the sampling", limit=SEED)
