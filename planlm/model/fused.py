"""Parts of transformers' LMs replaced by faster ones that compute the same.

Sizes: B rows, W positions, H heads, d channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.pytorch_utils import Conv1D

from planlm.kernels import gelu
from planlm.model.families import is_plain


def fuse(lm: PreTrainedModel) -> None:
    """Replace what has a faster equivalent, in place; names and weights stay as they are."""
    for module in lm.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, FusedGELU())
        if type(module) is GPT2MLP:
            module.__class__ = FusedMLP  # names, weights and its own hooks stay as they are


class FusedGELU(NewGELUActivation):
    """GPT-2's activation. transformers' eight operations keep five matrices for the backward pass, this one its input.

    Without a backward pass it stays transformers' own, so that an LM evaluates to the same bits as there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The activation of each element."""
        if input.requires_grad:
            return gelu(input)
        plain: Tensor = super().forward(input)
        return plain


class FusedMLP(GPT2MLP):
    """GPT-2's feed-forward half: it keeps what enters the activation and not what leaves it, a fifth of all it keeps.

    Without a backward pass, under `torch.compile` and where its parts are others (LoRA) or have hooks, it is
    transformers'.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, W, d]` to the same."""
        wide = self.c_fc(hidden_states)
        own = is_plain(self.act, FusedGELU) and is_plain(self.c_proj, Conv1D)
        if not own or not wide.requires_grad or torch.compiler.is_compiling():
            plain: Tensor = self.dropout(self.c_proj(self.act(wide)))
            return plain
        out: Tensor = self.dropout(_GELUProjection.apply(wide, self.c_proj.weight, self.c_proj.bias))
        return out


def _sum(rows: Tensor) -> Tensor:
    return rows.sum(dim=0, dtype=torch.promote_types(rows.dtype, torch.float32))


class _GELUProjection(torch.autograd.Function):
    """`gelu(x) weight + bias`; the activation is computed again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = torch.addmm(bias.to(x.dtype), gelu(x).flatten(0, -2), weight.to(x.dtype))
        return out.view(*x.shape[:-1], weight.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            activated = gelu(x)
        of_x = of_weight = None
        if needs_weight:
            of_weight = (activated.detach().flatten(0, -2).t() @ flat).to(weight.dtype)
        if needs_x:
            (of_x,) = torch.autograd.grad(activated, x, (flat @ weight.to(x.dtype).t()).view_as(x))
        return of_x, of_weight, _sum(flat).to(weight.dtype) if needs_bias else None
