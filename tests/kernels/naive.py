"""docs/method.md's table written out one sentence and one action at a time, and the same as users write it.

Independent of `kernels/reference.py` on purpose: the loops share no code and no formulation with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

DEFAULTS = {
    "temperature": 1.0, "selection": "soft", "oracle": None, "oracle_weight": 0.0, "noise": None, "top_k": None
}  # fmt: skip


def plan_projection_loop(
    logits: Tensor, codebook: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Projected, log_normalizer and oracle_nll by loops; the hard selections carry no gradient to the logits."""
    temperature, selection, oracle, oracle_weight, noise, top_k = (DEFAULTS | options).values()
    num_sentences, num_actions = logits.shape
    projected, normalizers, nlls = [], [], []
    for s in range(num_sentences):
        scores = logits[s] if noise is None else logits[s] + noise[s]
        order = sorted(range(num_actions), key=lambda k: (-scores[k].item(), k))
        kept = order[:top_k] if selection == "top-k" else order
        peak = scores[order[0]].item()
        exponentials = {k: torch.exp((scores[k] - peak) / temperature) for k in kept}
        total = sum(exponentials.values())
        if selection in ("soft", "gumbel", "top-k"):
            mixture = sum(exponentials[k] / total * codebook[k] for k in kept)
        elif selection in ("hard", "straight-through", "gumbel-hard"):
            mixture = codebook[order[0]]
        elif selection == "oracle":
            mixture = codebook[oracle[s]]
        elif selection == "uniform":
            mixture = sum(codebook[k] for k in range(num_actions)) / num_actions
        else:
            assert selection == "fixed", f"write {selection!r} here too"
            mixture = codebook[0]
        nll = logits.new_zeros(())
        if oracle is not None and oracle[s] >= 0:
            weighed = oracle_weight if isinstance(oracle_weight, float) else oracle_weight[s]
            mixture = (1 - weighed) * mixture + weighed * codebook[oracle[s]]
            top = max(value.item() for value in logits[s])
            nll = torch.log(sum(torch.exp(value - top) for value in logits[s])) + top - logits[s, oracle[s]]
        row = [sum(weight[d, a] * mixture[a] for a in range(codebook.shape[1])) for d in range(weight.shape[0])]
        projected.append(torch.stack(row) if bias is None else torch.stack(row) + bias)
        normalizers.append(torch.log(total) + peak / temperature)
        nlls.append(nll)
    if num_sentences == 0:
        return logits.new_zeros(0, weight.shape[0]), logits.new_zeros(0), logits.new_zeros(0)
    return torch.stack(projected), torch.stack(normalizers), torch.stack(nlls)


def plan_projection_eager(
    logits: Tensor, codebook: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as a user would write it, in the inputs' own precision throughout: the yardstick for bf16 errors."""
    temperature, selection, oracle, oracle_weight, noise, top_k = (DEFAULTS | options).values()
    scores = logits if noise is None else logits + noise
    if selection == "top-k":
        scores = scores.masked_fill(scores < scores.topk(top_k, dim=1).values[:, -1:], -math.inf)
    probabilities = (scores / temperature).softmax(dim=1)
    one_hot = torch.nn.functional.one_hot(scores.argmax(dim=1), logits.shape[1]).to(logits.dtype)
    if selection in ("straight-through", "gumbel-hard"):
        mixture = (one_hot - probabilities.detach() + probabilities) @ codebook
    elif selection == "hard":
        mixture = one_hot @ codebook
    elif selection == "oracle":
        mixture = codebook[oracle]
    elif selection == "uniform":
        mixture = codebook.mean(dim=0).expand(len(logits), -1)
    elif selection == "fixed":
        mixture = codebook[0].expand(len(logits), -1)
    else:
        assert selection in ("soft", "gumbel", "top-k"), f"write {selection!r} here too"
        mixture = probabilities @ codebook
    nll = torch.zeros(len(logits), dtype=logits.dtype)
    if oracle is not None:
        labelled = oracle >= 0
        weighed = torch.where(labelled, oracle_weight, 0.0).to(logits.dtype)[:, None]
        mixture = (1 - weighed) * mixture + weighed * codebook[oracle.clamp(min=0)]
        picked = logits.log_softmax(dim=1).gather(1, oracle.clamp(min=0)[:, None])[:, 0]
        nll = torch.where(labelled, -picked, 0.0)
    projected = mixture @ weight.T
    return projected if bias is None else projected + bias, (scores / temperature).logsumexp(dim=1), nll


def eager_from_hidden(hidden: Tensor, head: Tensor, head_bias: Tensor, **rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`plan_projection_eager` of a planner's states."""
    return plan_projection_eager(torch.nn.functional.linear(hidden, head, head_bias), **rest)


def add_plan_loop(x: Tensor, plan: Tensor, segment_ids: Tensor, gate: Tensor | None = None) -> Tensor:
    """`add_plan` one token at a time."""
    rows = []
    for t, segment in enumerate(segment_ids.tolist()):
        added = x[t] if segment < 0 else x[t] + (plan[segment] if gate is None else gate * plan[segment])
        rows.append(added)
    return torch.stack(rows) if rows else x.new_zeros(x.shape)
