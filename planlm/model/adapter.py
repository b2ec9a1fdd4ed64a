"""Conditioning of an LM on plans: docs/method.md's `adapter`, `embedding` and `insert`.

`adapter` adds `g_l * (W_l m + b_l)` at each conditioned layer, `embedding` adds one such vector to the token
embeddings, `insert` makes a position of it.

Sizes: B windows, W positions, S plan segments, K actions, A action dimension, D stacked widths of what plans are added
to, L conditioned layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from planlm.kernels import PlanProjection, StackedPlan, add_plan, plan_projection
from planlm.model.configuration import PlanLMConfig
from planlm.model.families import conditioned_widths
from planlm.model.insertion import InsertedPlans, check_lm, token_embeddings
from planlm.plan_inputs import PlanInputs


class LayerPlans:
    """What one call of the LM adds at each conditioned layer; handed through it as the keyword `plan`.

    Args:
        projected: `[S, D]` projected plans.
        inputs: which position has which segment.
        widths: of the conditioned layers, which stand side by side in D.
        gate: `[D]` or None.
        first_layer: the lowest conditioned layer; all above it are.
    """

    def __init__(
        self, projected: Tensor, inputs: PlanInputs, widths: list[int], gate: Tensor | None, first_layer: int
    ) -> None:
        self._plan, self._first_layer = StackedPlan(projected, widths, inputs.segment_bounds), first_layer
        self._gates: tuple[Tensor | None, ...] = (None,) * len(widths) if gate is None else gate.split(widths)
        self._segment_ids = inputs.segment_ids.reshape(-1)

    def run(self, base: nn.Module, call: dict[str, Any]) -> Any:
        """Call an LM's base model, or its upper part, with these plans; `call` has the other arguments."""
        return base(**call, plan=self)  # what attention.attend takes under this name

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


class EmbeddedPlans:
    """What one call of the LM adds to the embeddings of its tokens.

    Args:
        projected: `[S, d]` projected plans.
        segment_ids: `[B, W]` segment of each position, -1 for none.
        gate: `[d]` or None.
    """

    def __init__(self, projected: Tensor, segment_ids: Tensor, gate: Tensor | None) -> None:
        self._projected, self._segment_ids, self._gate = projected, segment_ids.reshape(-1), gate

    def run(self, base: PreTrainedModel, call: dict[str, Any]) -> Any:
        """Call an LM's base model with these plans; `call` has the other arguments."""
        embeds = token_embeddings(base, call)
        gate = None if self._gate is None else self._gate.to(embeds.device)
        plan, ids = self._projected.to(embeds.device), self._segment_ids.to(embeds.device)
        planned = add_plan(embeds.flatten(0, 1), plan, ids, gate)
        return base(**call | {"input_ids": None, "inputs_embeds": planned.view(embeds.shape)})


class PlanAdapter(nn.Module):
    """Action embeddings and their projections into an LM, for all layers stacked so that one product serves all.

    Without a gate the projection starts at zero, with one the gate does: either way training starts from the base LM.
    Positions that are inserted cannot start from there. They start as the mean token embedding whatever the plan: the
    LM knows such inputs, and as with the others it is the plan's gradient that gives the projection its direction.

    Args:
        lm: the LM to condition.
        config: of the model.

    Raises:
        InputError: positions are to be inserted into an LM that attends to a limited number of them.
    """

    def __init__(self, lm: PreTrainedModel, config: PlanLMConfig) -> None:
        super().__init__()
        self.conditioning, num_layers = config.conditioning, config.conditioned_layers
        self.first_layer, self.widths = conditioned_widths(lm, num_layers)
        shape = [num_layers] if config.codebook_per_layer else []
        if config.conditioning in ("embedding", "insert"):
            self.first_layer, self.widths = -1, [lm.get_input_embeddings().embedding_dim]
        total = sum(self.widths)  # D, all conditioned layers side by side
        self.codebook = nn.Parameter(torch.zeros(*shape, config.num_actions, config.action_dim))
        self.weight = nn.Parameter(torch.zeros(total, config.action_dim))
        self.bias = nn.Parameter(torch.zeros(total))
        self.gate = nn.Parameter(torch.zeros(total)) if config.gate else None
        if config.gate:
            nn.init.xavier_normal_(self.weight)
        if config.conditioning == "insert":
            check_lm(lm)
            with torch.no_grad():
                self.bias.copy_(lm.get_input_embeddings().weight.float().mean(dim=0))

    def forward(self, logits: Tensor | None, inputs: PlanInputs, **how: Any) -> tuple[PlanProjection, Plans]:
        """Project the plans of a call.

        Args:
            logits: `[S, K]` of the planner, or None where the selection does not ask it.
            inputs: which position has which of the S segments.
            how: keywords of `plan_projection`.

        Returns:
            (projection with `projected` `[S, D]`, what runs the LM with the plans).
        """
        if logits is None:
            logits = self.codebook.new_zeros(len(inputs.segment_rows), self.codebook.shape[-2])
        if self.codebook.ndim == 2:
            projection = plan_projection(logits, self.codebook, self.weight, self.bias, **how)
        else:
            own = zip(self.codebook, self.weight.split(self.widths), self.bias.split(self.widths), strict=True)
            layers = [plan_projection(logits, *layer, **how) for layer in own]
            projection = layers[0]._replace(projected=torch.cat([layer.projected for layer in layers], dim=1))
        projected, segment_ids = projection.projected, inputs.segment_ids
        if self.conditioning == "insert":
            return projection, InsertedPlans(projected, segment_ids)
        if self.conditioning == "embedding":
            return projection, EmbeddedPlans(projected, segment_ids, self.gate)
        return projection, LayerPlans(projected, inputs, self.widths, self.gate, self.first_layer)


Plans = LayerPlans | EmbeddedPlans | InsertedPlans
"""The plans of a call; `run` calls the LM's base model with them and returns its output."""
