"""What a forward pass of the joint model returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class PlanLMOutput(ModelOutput):
    """What a forward pass returns, in the order of transformers' causal LMs.

    Everything is of the tokens' positions, also where plans are positions of their own.

    Attributes:
        loss: mean NLL of the labelled tokens (nats), where labels were given.
        logits: `[B, W or logits_to_keep, V]`, but where `shift_labels` were given.
        past_key_values: KV cache.
        hidden_states, attentions: of the LM, where they were asked for.
        nll_sum: sum of the labelled tokens' NLL, differentiable.
        token_nll: `[B, W]` float32 NLL of each labelled token, detached, 0 elsewhere; None from a loss kernel that
            sums them itself.
        kl_sum: sum over the labelled tokens of the divergence from a reference, where there is one; differentiable.
        oracle_nll: `[S]` planner cross-entropy with the oracle action, where actions were given; differentiable. Where
            `PlanInputs.want_oracle_nll` asks for it, it is a mean over the planner's horizon.
        action_logits: `[S, K]` planner logits, where the planner ran.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    nll_sum: Tensor | None = None
    token_nll: Tensor | None = None
    kl_sum: Tensor | None = None
    oracle_nll: Tensor | None = None
    action_logits: Tensor | None = None
