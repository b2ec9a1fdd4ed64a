"""`evaluate-generation --steer`: whether sentences carry the actions that were asked for.

Sizes: n prompts, K actions, A dimensions of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from planlm.config import EvaluateGenerationConfig
from planlm.corpus.store import PreparedCorpus
from planlm.evaluation.generation_statistics import Following, compare_following
from planlm.evaluation.generation_texts import Prompt
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.tracking import SentenceTracker, centroid_distances
from planlm.selections import SELECTIONS

STEERED = "steered"
"""Name of the texts that follow the actions asked for."""


@dataclass(frozen=True)
class Steering:
    """What is asked for.

    Attributes:
        selection: under which both texts are generated: the one trained with, where a prompt can have it, else soft.
        frequencies: of the actions in the training split, float64 `[K]`.
        asked: by document, an action for each sentence that its continuation may have.
    """

    selection: str
    frequencies: NDArray[np.float64]
    asked: dict[int, list[int]]

    @classmethod
    def draw(
        cls,
        model: PlanLMForCausalLM,
        corpus: PreparedCorpus,
        prompts: Sequence[Prompt],
        config: EvaluateGenerationConfig,
    ) -> Steering:
        """Actions drawn by the corpus's frequencies; a document's are a function of it and the seed."""
        selection = model.config.selection
        if selection == "none" or SELECTIONS[selection].needs_oracle or SELECTIONS[selection].needs_others:
            selection = "soft"
        counts = corpus.action_counts.double().numpy()
        frequencies = counts / counts.sum()
        asked = {
            document: np.random.default_rng((config.seed, document))
            .choice(len(frequencies), size=config.max_new_tokens, p=frequencies)
            .tolist()
            for document in (prompt.document for prompt in prompts)
        }
        return cls(selection, frequencies, asked)

    def measure(
        self,
        texts: dict[str, list[list[int]]],
        prompts: Sequence[Prompt],
        tracker: SentenceTracker,
        codebook: NDArray[np.float32],
        config: EvaluateGenerationConfig,
    ) -> tuple[dict[str, Any], dict[str, dict[str, list[float]]]]:
        """Hold steered and unsteered texts against what was asked for.

        Args:
            texts: new tokens of every prompt, by name.
            prompts: what they continue.
            tracker: of the corpus's encoder.
            codebook: `[K, A]`.
            config: seed and draws of the bootstrap.

        Returns:
            (the result, with `selection` and `attempts`; every prompt's values by name of the text).
        """
        found = {}
        for name, own in ((STEERED, texts[STEERED]), ("unsteered", texts[self.selection])):
            ranks = [
                follow(prompt.ids, new, self.asked[prompt.document], tracker, codebook)
                for prompt, new in zip(prompts, own, strict=True)
            ]
            found[name] = Following.of_ranks(ranks)
        how = {"resamples": config.bootstrap, "seed": config.seed}
        compared = compare_following(found[STEERED], found["unsteered"], self.frequencies, **how)
        kept = {name: {key: value.tolist() for key, value in vars(one).items()} for name, one in found.items()}
        return {"selection": self.selection, "attempts": config.attempts, **compared}, kept


def follow(
    prompt: list[int], new: list[int], asked: Sequence[int], tracker: SentenceTracker, codebook: NDArray[np.float32]
) -> list[int]:
    """For each complete sentence that was begun behind a prompt, the rank of its action's centroid, 1 for the nearest.

    Sentences are those that the plan was made for.

    Args:
        prompt: its tokens.
        new: those of its continuation.
        asked: actions for the sentence that the prompt leaves open and those after it.
        tracker: finds and embeds the sentences.
        codebook: `[K, A]`.
    """
    tracker.start(torch.tensor([prompt]))
    text = tracker.track([*prompt, *new])
    first = text.segments[len(prompt) - 1]  # the sentence of the first new token
    begun = first + (text.segments[max(0, len(prompt) - 2)] == first)  # without one that began in the prompt
    ranks = []
    for number, sentence in enumerate(text.finished[1 + begun :], begun - first):
        distances = centroid_distances(sentence.embedding, codebook)
        ranks.append(1 + int((distances < distances[asked[number]]).sum()))
    return ranks
