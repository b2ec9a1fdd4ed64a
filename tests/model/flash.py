"""torch's flash attention over documents on a CPU: what CUDA's kernels are told, computed document by document.

`varlen_attn`, its operators and gradients stay torch's; only the two kernels below it are replaced. They
refuse what those refuse, but for float32, in which they are compared, and fill what no document holds with NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def flash_on_cpu() -> Iterator[list[dict[str, Any]]]:
    """Inside, `varlen_attn` and what it calls run on a CPU; gives a list that gets a line a call of a kernel."""
    calls: list[dict[str, Any]] = []

    def forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, ...]:
        call = _checked(query, key, value, *rest, **named)
        calls.append({"kernel": "forward", **call})
        out, lse = torch.full_like(query, torch.nan), query.new_full(query.shape[1::-1], torch.nan)
        for at in call["documents"]:
            scores = _scores(query[at], key[at], call)
            lse[:, at] = scores.logsumexp(-1)
            out[at] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), _shared(value[at], query))
        return out, lse, query.new_zeros(2), query.new_zeros(0), query.new_zeros(0)

    def backward(
        slope: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *rest: Any, **named: Any
    ) -> tuple[Tensor, ...]:
        rest = (*rest[:6], False)  # in place of the random state
        call = _checked(query, key, value, *rest, **named)
        calls.append({"kernel": "backward", **call})
        found = [torch.full_like(tensor, torch.nan) for tensor in (query, key, value)]
        for at in call["documents"]:
            weights = (_scores(query[at], key[at], call) - lse[:, at, None]).exp()  # [H, q, k]
            of_weights = torch.einsum("qhd,khd->hqk", slope[at], _shared(value[at], query))
            of_scores = weights * (of_weights - (slope[at] * out[at]).sum(-1).T[..., None]) * call["scale"]
            found[0][at] = torch.einsum("hqk,khd->qhd", of_scores, _shared(key[at], query))
            for to, weight, of in ((1, of_scores, query), (2, weights, slope)):
                found[to][at] = _summed(torch.einsum("hqk,qhd->khd", weight, of[at]), key)
        return tuple(found)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield calls


def _checked(
    query: Tensor, key: Tensor, value: Tensor, begins: Tensor, begins_k: Tensor, longest: int, longest_k: int,
    dropout: float, is_causal: bool, debug: bool, *, scale: float, window_size_left: int, window_size_right: int,
    **rest: Any,
) -> dict[str, Any]:  # fmt: skip
    """A call's settings, after the checks of mha_varlen_fwd."""
    assert not any(value is not None for value in rest.values()) and not debug and dropout == 0
    assert query.dtype == key.dtype == value.dtype and all(t.stride(-1) == 1 for t in (query, key, value))
    assert query.ndim == key.ndim == value.ndim == 3 and key.shape == value.shape and len(key) == len(query)
    assert query.shape[1] % key.shape[1] == 0 and query.shape[2] == key.shape[2] and query.shape[2] % 8 == 0
    assert begins.dtype == torch.int32 and begins.is_contiguous() and torch.equal(begins, begins_k)
    ends = begins.tolist()
    assert ends[0] == 0 and ends[-1] == len(query) and ends == sorted(ends)
    assert max(end - begin for begin, end in itertools.pairwise(ends)) <= longest == longest_k
    assert window_size_right == 0 and is_causal == (window_size_left == -1)
    return {
        "documents": [slice(begin, end) for begin, end in itertools.pairwise(ends) if begin < end],
        "scale": scale, "back": window_size_left, "longest": longest, "entries": len(ends),
    }  # fmt: skip


def _shared(tensor: Tensor, query: Tensor) -> Tensor:
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def _summed(tensor: Tensor, key: Tensor) -> Tensor:
    return tensor.unflatten(1, (key.shape[1], -1)).sum(dim=2)


def _scores(query: Tensor, key: Tensor, call: dict[str, Any]) -> Tensor:
    """`[H, q, k]`, minus infinity where nothing is seen."""
    at = torch.arange(len(query))
    seen = at <= at[:, None]
    if call["back"] >= 0:
        seen &= at >= at[:, None] - call["back"]
    scores = torch.einsum("qhd,khd->hqk", query, _shared(key, query)) * call["scale"]
    return scores.masked_fill(~seen, -torch.inf)
