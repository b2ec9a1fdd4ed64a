"""What is said of a generated text's plan, sentence by sentence.

Sizes: K actions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.tracking import SentenceTracker

TOP_ACTIONS = 3
"""Most probable actions reported for each sentence."""


def describe(
    model: PlanLMForCausalLM, tracker: SentenceTracker, prompt: list[int], new: list[int], place: tuple[int, int]
) -> list[dict[str, Any]]:
    """The sentence that the prompt left open and those after it, with the planner's distribution that each followed.

    Args:
        model: for the labels and the temperature.
        tracker: of the batch.
        prompt: tokens.
        new: those behind it.
        place: number of the text in the batch, and texts of the batch.
    """
    ids = [*prompt, *new]
    text = tracker.track(ids, *place)
    first = len(tracker.track(prompt, *place).sentences)
    described = []
    for at, sentence in enumerate([*text.sentences, tracker.decode(ids[text.open_start :]).strip()]):
        if at < first or not sentence:
            continue
        which, logits = (at - first, place[0]), text.finished[at].logits
        forced, drawn, actions = tracker.forced(*which), tracker.drawn(*which, logits), []
        if logits is not None:
            probabilities = (logits.float() / model.config.plan_temperature).softmax(dim=-1)
            values, likely = probabilities.topk(min(TOP_ACTIONS, len(probabilities)))
            actions = [
                {"action": action, "label": _label(model, action), "probability": round(value, 4)}
                for action, value in zip(likely.tolist(), values.tolist(), strict=True)
            ]
        action = action_of(tracker, which, logits)
        described.append(
            {
                "sentence": sentence,
                "action": action,
                "label": _label(model, action),
                "actions": actions,
                "forced": None if forced < 0 else forced,
                "drawn": None if drawn < 0 else drawn,
            }
        )
    return described


def action_of(tracker: SentenceTracker, which: tuple[int, int], logits: Tensor | None) -> int | None:
    """The action of a sentence: forced, drawn, or the most probable; None where no planner was asked.

    Args:
        tracker: what the text was generated with.
        which: number of the sentence behind the one that its prompt leaves open, and of the prompt.
        logits: `[K]` of the planner, if it was asked.
    """
    forced, drawn = tracker.forced(*which), tracker.drawn(*which, logits)
    likely = -1 if logits is None else int(logits.argmax())
    return next((action for action in (forced, drawn, likely) if action >= 0), None)


def _label(model: PlanLMForCausalLM, action: int | None) -> str | None:
    labels = model.config.action_labels
    return None if labels is None or action is None else labels[action] or None
