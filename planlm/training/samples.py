"""Samples while a run trains (`--sample-every`): the same prompts continued by the model as it is now and then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from planlm.config import GenerateConfig, TrainConfig
from planlm.corpus.store import PreparedCorpus
from planlm.distribution import on_rank_zero, world_size
from planlm.model.generation import continuing
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.prompts import Prompt
from planlm.selections import SELECTIONS
from planlm.training.run_directory import Run
from planlm.training.validation import evaluating

DOCUMENTS = 3
"""Of the validation split, whose first sentences are continued where no file says what."""

NEW_TOKENS = 64
"""Of a sample; of an LM with a short context half of that."""

SHOWN = 100
"""Characters of a sample in the terminal."""

_KEPT = ("id", "prompt", "text", "plan")
"""What of a result of `generate` is kept."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """When to write samples, and how.

    Attributes:
        make: results of `generate` by the model as it is now; called on rank 0 alone.
        every: steps between samples; None: never.
    """

    make: Callable[[], list[dict[str, Any]]] = list
    every: int | None = None

    def after(self, step: int, run: Run, tell: Callable[[str], None]) -> None:
        """Where they are due after `step` (1-based), write samples into the run directory, and a line of each."""
        if self.every is None or step % self.every:
            return

        def write() -> None:
            samples = [{"step": step, **{key: one[key] for key in _KEPT if key in one}} for one in self.make()]
            run.log_samples(samples)
            for sample in samples:
                text = " ".join(f"{sample['prompt']} >>> {sample['text'].strip()}".split())
                tell(f"sample after step {step}: {text[:SHOWN]}{'...' * (len(text) > SHOWN)}")

        on_rank_zero(write)


def sample_problems(config: TrainConfig) -> list[str]:
    """What stands against the samples that a run's settings ask for."""
    if config.sample_every is None:
        return [] if config.sample_prompts is None else ["--sample-prompts is for --sample-every; set that too"]
    found, selection = [], SELECTIONS[config.selection]
    if config.shard and world_size() > 1:
        found.append("--sample-every: with --shard no process has the whole model to generate with; leave one out")
    if selection.needs_oracle or selection.needs_others:
        found.append(f"--sample-every: --selection {config.selection} has no plan for a text yet to be written")
    return found


def samples(config: TrainConfig, corpus: PreparedCorpus, model: PlanLMForCausalLM, lm: str) -> Samples:
    """The samples of a run. They change nothing of training: steps seed what they draw themselves.

    Args:
        config: the command's configuration.
        corpus: of `--corpus`.
        model: what trains, whole on rank 0.
        lm: what the run began with.

    Raises:
        InputError: there is nothing to continue, or the model cannot generate as it is trained.
    """
    if config.sample_every is None:
        return Samples()

    def prepare() -> Callable[[], list[dict[str, Any]]]:
        context = model.lm.config.max_position_embeddings
        tokens = min(NEW_TOKENS, context // 2)
        prompts = None if config.sample_prompts is not None else _beginnings(corpus, model, context - tokens)
        how = GenerateConfig(run=lm, prompts=config.sample_prompts, max_new_tokens=tokens, seed=config.seed)
        return continuing(how, model, prompts, "--sample-prompts")

    found = on_rank_zero(prepare)

    def make() -> list[dict[str, Any]]:
        assert found is not None
        # A compiled LM would be compiled again for these shapes, until torch gives up and runs training's uncompiled.
        with evaluating(model), torch.compiler.set_stance("force_eager"):
            return found()

    return Samples(make=make, every=config.sample_every)


def _beginnings(corpus: PreparedCorpus, model: PlanLMForCausalLM, most: int) -> list[Prompt]:
    """The first sentences, of at most so many tokens, of the first documents of the validation split."""
    prompts = []
    for number, row in enumerate(corpus.split("validation").select_columns(["input_ids", "sentence_tokens"])):
        if number == DOCUMENTS:
            break
        ids = row["input_ids"][: min(row["sentence_tokens"][0], most)]
        prompts.append(Prompt(number, model.tokenizer.decode(ids, skip_special_tokens=True), ids, []))
    return prompts
