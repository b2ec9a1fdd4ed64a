"""Conditioning of an LM on plans: METHOD.md's `adapter`, `g_l * (W_l m + b_l)` at each conditioned layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from planlm.kernels import add_plan
from planlm.model.families import input_width, output_projections


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
        self._plan: tuple[Tensor, Tensor] | None = None
        begin = 0
        for projection, width in zip(conditioned, self.widths, strict=True):
            projection.register_forward_pre_hook(self._hook(slice(begin, begin + width)))
            begin += width

    def _hook(self, channels: slice) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self._plan is None:
                return None
            projected, segment_ids = self._plan
            x = inputs[0]  # [B, W, d]
            gate = None if self.gate is None else self.gate[channels].to(x.dtype)
            plan = projected[:, channels].to(x.dtype)
            return (add_plan(x.reshape(-1, x.shape[-1]), plan, segment_ids, gate=gate).view(x.shape), *inputs[1:])

        return add

    def condition(self, projected: Tensor | None, segment_ids: Tensor | None) -> None:
        """Set what the hooks add from now on.

        Args:
            projected: `[S, D]` projected plans, or None to switch conditioning off.
            segment_ids: `[B, W]` row of `projected` for each position, -1 for none.
        """
        self._plan = None if projected is None or segment_ids is None else (projected, segment_ids.reshape(-1))
