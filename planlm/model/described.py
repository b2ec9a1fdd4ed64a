"""What is said of a generated text's plan, sentence by sentence.

Sizes: K actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.tracking import SentenceTracker, centroid_distances

TOP_ACTIONS = 3
"""Most probable actions reported for each sentence."""


@dataclass(frozen=True)
class PlannedSentence:
    """A sentence that was continued or begun, and the plan that it was written with.

    Attributes:
        text: its text, where the prompt left it open from its beginning.
        place: its number in the whole text, from 0.
        finished: False where generation broke off in it.
        action: forced on it or drawn for it, else the most probable; None where no planner was asked.
        forced: action that `--plan` asked for, if any.
        drawn: action that was drawn, if any.
        carried: action that it carries as it was written; None where it is not finished, or the model cannot tell.
        probabilities: float32 `[K]`, as the planner's were used; None where it was not asked.
    """

    text: str
    place: int
    finished: bool
    action: int | None
    forced: int | None
    drawn: int | None
    carried: int | None
    probabilities: Tensor | None

    def describe(self, labels: Sequence[str] | None) -> dict[str, Any]:
        """What a result has of it, ready for JSON; `labels` of the actions, if there are any."""
        actions = []
        if self.probabilities is not None:
            values, likely = self.probabilities.topk(min(TOP_ACTIONS, len(self.probabilities)))
            actions = [
                {"action": action, "label": label_of(action, labels), "probability": round(value, 4)}
                for action, value in zip(likely.tolist(), values.tolist(), strict=True)
            ]
        return {
            "sentence": self.text,
            "action": self.action,
            "label": label_of(self.action, labels),
            "actions": actions,
            "forced": self.forced,
            "drawn": self.drawn,
            "carried": self.carried,
        }


def planned_sentences(
    model: PlanLMForCausalLM, tracker: SentenceTracker, prompt: list[int], new: list[int], place: tuple[int, int]
) -> list[PlannedSentence]:
    """The sentence that the prompt left open and those after it, with the planner's distribution that each followed.

    Args:
        model: for the temperature.
        tracker: of the batch.
        prompt: tokens.
        new: those behind it.
        place: number of the text in the batch, and texts of the batch.
    """
    ids = [*prompt, *new]
    text = tracker.track(ids, *place)
    first = len(tracker.track(prompt, *place).sentences)
    found = []
    for at, sentence in enumerate([*text.sentences, tracker.decode(ids[text.open_start :]).strip()]):
        if at < first or not sentence:
            continue
        which, logits = (at - first, place[0]), text.finished[at].logits
        forced, drawn = tracker.forced(*which), tracker.drawn(*which, logits)
        is_finished, carried = at < len(text.sentences), None
        if is_finished and model.has_centroids:
            carried = int(centroid_distances(text.finished[at + 1].embedding, model.centroids.numpy()).argmin())
        found.append(
            PlannedSentence(
                sentence,
                at,
                is_finished,
                action_of(tracker, which, logits),
                None if forced < 0 else forced,
                None if drawn < 0 else drawn,
                carried,
                None if logits is None else (logits.float() / model.config.plan_temperature).softmax(dim=-1),
            )
        )
    return found


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


def label_of(action: int | None, labels: Sequence[str] | None) -> str | None:
    """What an action is called; None where it is not."""
    return None if labels is None or action is None else labels[action] or None
