"""Parts of transformers' LMs replaced by faster ones that compute the same.

Sizes: B rows, W positions, H heads, d channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block
from transformers.pytorch_utils import Conv1D

from planlm.kernels import gelu, has_packed_attention, packed_attention
from planlm.model.recomputation import InputRecomputation

ATTENTION = "planlm"
"""transformers' name of `attention`: its `sdpa`, and `packed_attention` where `document_starts` stand for the mask."""


def fuse(lm: PreTrainedModel) -> None:
    """Replace what has a faster equivalent, in place; names and weights stay as they are."""
    if lm.config._attn_implementation == "sdpa":
        lm.config._attn_implementation = ATTENTION
    for module in lm.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, FusedGELU())
        if type(module) is GPT2MLP:
            module.__class__ = FusedMLP  # names, weights and its own hooks stay as they are
        if isinstance(module, GPT2Block):
            _recompute_normed(module.ln_1, module.attn.c_attn)
            _recompute_normed(module.ln_2, module.mlp.c_fc)


def _recompute_normed(norm: nn.Module, product: nn.Module) -> None:
    """Let the one matrix product that takes a norm's result keep it no more than the norm does.

    The product would keep it in autocast's dtype, so the norm brings it to that.
    """
    recomputation = InputRecomputation(product)
    applied: list[tuple[nn.Module, Tensor]] = []  # the norm, a copy's own if the LM was copied, and its input

    def after(norm: nn.Module, inputs: tuple[Tensor, ...], normed: Tensor) -> Tensor:
        applied[:] = [(norm, inputs[0])]
        where = normed.device.type
        return normed.to(torch.get_autocast_dtype(where)) if torch.is_autocast_enabled(where) else normed

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if applied:
            (norm, x), dtype = applied.pop(), inputs[0].dtype
            recomputation.enter(inputs[0], lambda x: norm.forward(x).to(dtype), x, *norm.parameters())

    norm.register_forward_hook(after)
    product.register_forward_pre_hook(before)


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
        own = isinstance(self.act, FusedGELU) and type(self.c_proj) is Conv1D
        own = own and not any(part._forward_hooks or part._forward_pre_hooks for part in (self.act, self.c_proj))
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


def document_starts(lm: PreTrainedModel, position_ids: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What `attention` takes for a mask, int64 `[B, 1, W, 1]`: where the document of each position begins in its row.

    None where transformers' own masks have to serve.

    Args:
        lm: an LM that was fused.
        position_ids: `[B, W]`, going on by one within a document.
        dtype: in which attention will be computed.
    """
    config = lm.config
    dropout = getattr(config, "attn_pdrop", getattr(config, "attention_dropout", 0.0))
    if (
        config._attn_implementation != ATTENTION
        or getattr(config, "sliding_window", None) is not None
        or (lm.training and dropout > 0)
        or not has_packed_attention(position_ids.device, dtype)
    ):
        return None
    # transformers' rule: a document begins where positions do not go on by one.
    begins = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
    at = torch.arange(position_ids.shape[1], device=position_ids.device)
    return at.where(begins, 0).cummax(dim=1).values[:, None, :, None]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; query, key and value are `[B, H, W, d]`, the result is `[B, W, H, d]`."""
    if attention_mask is None or attention_mask.dtype != torch.int64:
        mixed: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return mixed
    where = query.device.type
    if torch.is_autocast_enabled(where):  # rotary embeddings leave float32
        dtype = torch.get_autocast_dtype(where)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    starts = attention_mask[:, 0, :, 0]
    return packed_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), starts, scale), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
