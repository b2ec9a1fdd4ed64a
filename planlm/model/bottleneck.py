"""The parameter-matched control: as many weights as planner and adapter have, and no plan.

In each conditioned layer `h + W_2 GELU(W_1 h + b_1) + b_2` stands where the adapter's plan would be added. `W_2` and
`b_2` start at zero: training starts from the base LM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from planlm.model.adapter import PlanAdapter
from planlm.model.configuration import PlanLMConfig
from planlm.model.families import conditioned_widths
from planlm.model.planner import Planner


class Bottleneck(nn.Module):
    """Bottleneck networks behind the attention of the topmost layers of an LM.

    Args:
        lm: the LM.
        config: of the model; its adapter is what the weights are counted by.
        planner: whose weights count as well.
    """

    def __init__(self, lm: PreTrainedModel, config: PlanLMConfig, planner: Planner) -> None:
        super().__init__()
        self.first_layer, widths = conditioned_widths(lm, config.conditioned_layers)
        with torch.device("meta"):
            adapter = PlanAdapter(lm, config)
        left = sum(parameter.numel() for part in (planner, adapter) for parameter in part.parameters())
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for number, width in enumerate(widths):
            # A layer has 2 width * size + size + width weights; what rounding leaves is the next one's.
            share = left / (len(widths) - number)
            size = max(1, round((share - width) / (2 * width + 1)))
            left -= size * (2 * width + 1) + width
            up = nn.Linear(size, width)
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
            self.down.append(nn.Linear(width, size))
            self.up.append(up)

    def plans(self) -> BottleneckPlans:
        """What a call of the LM takes."""
        return BottleneckPlans(self)


@dataclass(frozen=True)
class BottleneckPlans:
    """Stands where a call's plans would; see `LayerPlans`. Not the module itself: accelerate moves what has `to`."""

    bottleneck: Bottleneck

    def run(self, base: nn.Module, call: dict[str, Any]) -> Any:
        """Call an LM's base model; `call` has the other arguments."""
        return base(**call, plan=self)

    def add(self, layer: int, x: Tensor) -> Tensor:
        """The attention output `[B, W, H, d]` of layer `layer` (0-based) with its network's result added."""
        own = self.bottleneck
        layer -= own.first_layer
        if layer < 0:
            return x
        states = x.flatten(2)  # [B, W, H d]
        added = own.up[layer](nn.functional.gelu(own.down[layer](states)))
        return x + added.to(x.device, x.dtype).view(x.shape)
