"""Conditioning of an LM on plans: docs/method.md's `adapter`, `g_l * (W_l m + b_l)` at each conditioned layer.

Sizes: B windows, W positions, S plan segments, K actions, A action dimension, D stacked input widths of the conditioned
layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from planlm.kernels import PlanProjection, StackedPlan, add_plan, plan_projection
from planlm.model.families import input_width, output_projections


class LayerPlans:
    """What one call of the LM adds at each conditioned layer; handed through it as the keyword `plan`.

    Args:
        projected: `[S, D]` projected plans.
        segment_ids: `[B, W]` segment of each position, -1 for none.
        widths: of the conditioned layers, which stand side by side in D.
        gate: `[D]` or None.
        first_layer: the lowest conditioned layer; all above it are.
    """

    def __init__(
        self, projected: Tensor, segment_ids: Tensor, widths: list[int], gate: Tensor | None, first_layer: int
    ) -> None:
        self._plan, self._first_layer = StackedPlan(projected, widths), first_layer
        self._gates: tuple[Tensor | None, ...] = (None,) * len(widths) if gate is None else gate.split(widths)
        self._segment_ids = segment_ids.reshape(-1)

    def add(self, layer: int, x: Tensor) -> Tensor:
        """The attention output `[B, W, H, d]` of layer `layer` (0-based) with that layer's plan added."""
        layer -= self._first_layer
        if layer < 0:
            return x
        tokens, gate = x.reshape(len(self._segment_ids), -1), self._gates[layer]  # [T, H d]
        if x.device != self._segment_ids.device:  # layers on several devices
            plan, ids = self._plan.plans[layer], self._segment_ids
            gate = None if gate is None else gate.to(x.device)
            return add_plan(tokens, plan.to(x.device), ids.to(x.device), gate).view(x.shape)
        return self._plan.add(layer, tokens, self._segment_ids, gate).view(x.shape)


class PlanAdapter(nn.Module):
    """Action embeddings and their projections into the topmost layers of an LM, stacked so that one product serves all.

    Without a gate the projection starts at zero, with one the gate does: either way training starts from the base LM.

    Args:
        lm: the LM to condition.
        num_actions: K.
        action_dim: dimension A of the plan.
        num_layers: how many layers, counted from the top.
        gate: whether each channel has a gate.
    """

    def __init__(self, lm: PreTrainedModel, num_actions: int, action_dim: int, num_layers: int, gate: bool) -> None:
        super().__init__()
        projections = output_projections(lm)
        self.first_layer = len(projections) - num_layers
        self.widths = [input_width(projection) for projection in projections[self.first_layer :]]
        total = sum(self.widths)  # D, all conditioned layers side by side
        self.codebook = nn.Parameter(torch.zeros(num_actions, action_dim))
        self.weight = nn.Parameter(torch.zeros(total, action_dim))
        self.bias = nn.Parameter(torch.zeros(total))
        self.gate = nn.Parameter(torch.zeros(total)) if gate else None
        if gate:
            nn.init.xavier_normal_(self.weight)

    def forward(
        self, logits: Tensor | None, segment_ids: Tensor, num_segments: int, **how: Any
    ) -> tuple[PlanProjection, LayerPlans]:
        """Project the plans of a call.

        Args:
            logits: `[S, K]` of the planner, or None where the selection does not ask it.
            segment_ids: `[B, W]` segment of each position, -1 for none.
            num_segments: S.
            how: keywords of `plan_projection`.

        Returns:
            (projection with `projected` `[S, D]`, what the LM takes).
        """
        if logits is None:
            logits = self.codebook.new_zeros(num_segments, len(self.codebook))
        projection = plan_projection(logits, self.codebook, self.weight, self.bias, **how)
        return projection, LayerPlans(projection.projected, segment_ids, self.widths, self.gate, self.first_layer)
