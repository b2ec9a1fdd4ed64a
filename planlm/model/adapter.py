"""Conditioning of an LM on plans: docs/method.md's `adapter`, `g_l * (W_l m + b_l)` at each conditioned layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from planlm.kernels import StackedPlan
from planlm.model.families import input_width, output_projections
from planlm.model.recomputation import InputRecomputation


class PlanAdapter(nn.Module):
    """Projections of the plan into the topmost layers of an LM, stacked so that one product serves all of them.

    Without a gate the projection starts at zero, with one the gate does: either way training starts from the base LM.

    Args:
        lm: the LM to condition; its attention output projections get a forward pre-hook.
        action_dim: dimension A of the plan.
        num_layers: how many layers, counted from the top.
        gate: whether each channel has a gate.
    """

    def __init__(self, lm: PreTrainedModel, action_dim: int, num_layers: int, gate: bool) -> None:
        super().__init__()
        conditioned = output_projections(lm)[-num_layers:]
        self.widths = [input_width(projection) for projection in conditioned]
        total = sum(self.widths)  # D, all conditioned layers side by side
        self.weight = nn.Parameter(torch.zeros(total, action_dim))
        self.bias = nn.Parameter(torch.zeros(total))
        self.gate = nn.Parameter(torch.zeros(total)) if gate else None
        if gate:
            nn.init.xavier_normal_(self.weight)
        self._plan: StackedPlan | None = None
        self._gates: tuple[Tensor | None, ...] = ()
        self._segment_ids: Tensor | None = None
        for layer, projection in enumerate(conditioned):
            projection.register_forward_pre_hook(self._hook(layer, InputRecomputation(projection)))

    def _hook(self, layer: int, recomputation: InputRecomputation) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self._plan is None or self._segment_ids is None:
                return None
            add_to = partial(self._plan.add, layer, segment_ids=self._segment_ids, gate=self._gates[layer])
            x = inputs[0]  # [B, W, d]
            tokens = x.reshape(-1, x.shape[-1])  # [T, d]
            planned = add_to(tokens)
            recomputation.enter(planned, add_to, tokens, self._plan.plans[layer], self._gates[layer])
            return (planned.view(x.shape), *inputs[1:])

        return add

    def condition(self, projected: Tensor | None, segment_ids: Tensor | None) -> None:
        """Set what the hooks add from now on.

        Args:
            projected: `[S, D]` projected plans, or None to switch conditioning off.
            segment_ids: `[B, W]` row of `projected` for each position, -1 for none.
        """
        if projected is None or segment_ids is None:
            self._plan, self._gates, self._segment_ids = None, (), None
            return
        self._plan = StackedPlan(projected, self.widths)
        self._gates = (None,) * len(self.widths) if self.gate is None else self.gate.split(self.widths)
        self._segment_ids = segment_ids.reshape(-1)
