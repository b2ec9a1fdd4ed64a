"""The selections of docs/method.md: what a sentence's plan can be, and what each of them needs.

A new one takes a row here and its computation in kernels/reference.py; one that `needs_others` is computed as `soft`
is, from another document's logits. Standard library only, for `planlm --help`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """Facts about a selection.

    Attributes:
        mixes: the plan is a mixture of actions, weighted by the planner's probabilities.
        hard_forward: the plan is the action that the planner finds most probable.
        noisy: Gumbel noise is added to the planner's logits in training.
        trains_planner: the LM's loss has a gradient for the planner.
        needs_oracle: the plan comes from the sentence itself, which must have been written.
        needs_top_k: it takes a number of actions to keep.
        needs_others: the plan is the mixture predicted for another document, which must be at hand.
    """

    mixes: bool = False
    hard_forward: bool = False
    noisy: bool = False
    trains_planner: bool = False
    needs_oracle: bool = False
    needs_top_k: bool = False
    needs_others: bool = False

    @property
    def asks_planner(self) -> bool:
        """Whether the plan depends on the planner."""
        return self.mixes or self.hard_forward


SELECTIONS = {
    "soft": Selection(mixes=True, trains_planner=True),
    "hard": Selection(hard_forward=True),
    "straight-through": Selection(hard_forward=True, trains_planner=True),
    "gumbel": Selection(mixes=True, noisy=True, trains_planner=True),
    "gumbel-hard": Selection(hard_forward=True, noisy=True, trains_planner=True),
    "top-k": Selection(mixes=True, trains_planner=True, needs_top_k=True),
    "oracle": Selection(needs_oracle=True),
    "uniform": Selection(),
    "fixed": Selection(),
    "shuffled": Selection(mixes=True, needs_others=True),
    "none": Selection(),  # the LM alone: without the adapter
}
"""By name, in the order of docs/method.md's table."""
