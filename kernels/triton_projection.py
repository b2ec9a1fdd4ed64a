"""`plan_projection` on CUDA: which kernels run on what, forward and backward, from logits or from hidden states.

From hidden states the logits exist a chunk of actions at a time: `hidden @ head[chunk].T` by the library, in float32,
into a scratch that every chunk reuses. The same kernels then run on the chunk, the forward going on from the state that
the chunks before have left. The backward computes each chunk again.

Launches from logits: 2 forward (3 where the actions are split over programs), 2 backward.

Sizes: S sentences, K actions, A action-embedding size, D plan size, P planner state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .triton_backward import mixture_bwd_kernel, projection_bwd_kernel
from .triton_forward import PARTS, combine_fwd_kernel, mixture_fwd_kernel, projection_fwd_kernel
from .triton_tiles import Tiles, choose_tiles, launch, num_processors, with_unit_columns

_SCRATCH_BYTES = 64 << 20
"""Of a chunk's logits: large enough for full-speed products (4096 sentences by 4096 actions), small beside a model."""

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Chunk:
    """Some actions' logits `[S, C]`, from action `first` on, with the parts of bias and noise that belong to them."""

    first: int
    logits: Tensor
    head_bias: Tensor | None
    noise: Tensor | None

    @property
    def end(self) -> int:
        return self.first + self.logits.shape[1]

    def arguments(self) -> dict[str, Any]:
        """What every kernel takes of it."""
        return {
            "logits": self.logits,
            "head_bias": self.head_bias,
            "noise": self.noise,
            "num_rows": self.logits.shape[0],
            "num_columns": self.logits.shape[1],
            "first_column": self.first,
            "logits_stride": self.logits.stride(0),
            "noise_stride": 0 if self.noise is None else self.noise.stride(0),
        }

    def scores(self) -> Tensor:
        """Bit for bit what the kernels compute."""
        scores = self.logits.float()
        if self.head_bias is not None:
            scores = scores + self.head_bias.float()
        return scores if self.noise is None else scores + self.noise.float()


@dataclass(frozen=True)
class _Planner:
    """Where the scores come from and what is done with them."""

    source: Tensor
    head: Tensor | None
    head_bias: Tensor | None
    noise: Tensor | None
    oracle: Tensor | None
    temperature: float
    top_k: int

    @property
    def num_sentences(self) -> int:
        return self.source.shape[0]

    @property
    def num_actions(self) -> int:
        return self.source.shape[1] if self.head is None else self.head.shape[0]

    @property
    def raw(self) -> bool:
        """Whether the oracle's cross-entropy needs statistics other than those of the scores."""
        changed = self.noise is not None or self.top_k > 0 or self.temperature != 1.0
        return self.oracle is not None and changed

    def chunks(self) -> Iterator[_Chunk]:
        """All actions at once from logits; from hidden states as many as the scratch holds, which the next overwrite."""
        if self.head is None:
            yield _Chunk(0, self.source, None, self.noise)
            return
        # An eighth of the actions, so that both scratches of the backward stay well below S * K elements.
        width = max(1, min(self.num_actions // 8, _SCRATCH_BYTES // (4 * self.num_sentences)))
        width = width // 64 * 64 or width
        scratch = torch.empty(self.num_sentences, width, dtype=torch.float32, device=self.source.device)
        for first in range(0, self.num_actions, width):
            end = min(first + width, self.num_actions)
            logits = scratch[:, : end - first]
            _product(self.source, self.head[first:end].T, logits)
            yield _Chunk(
                first,
                logits,
                None if self.head_bias is None else self.head_bias[first:end],
                None if self.noise is None else self.noise[:, first:end],
            )


def plan_projection(
    source: Tensor,
    head: Tensor | None,
    head_bias: Tensor | None,
    codebook: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    noise: Tensor | None,
    oracle: Tensor | None,
    oracle_weight: Tensor | None,
    temperature: float,
    top_k: int,
) -> Outputs:
    """Forward of `planlm.kernels.plan_projection` (soft selections) and what its backward needs.

    Args:
        source (Tensor): logits `[S, K]`, or with head planner states `[S, P]`.
        head (Tensor | None): `[K, P]`.
        head_bias (Tensor | None): `[K]`.
        codebook (Tensor | None): `[K, A]`; None: statistics only.
        weight (Tensor | None): `[D, A]` in codebook's dtype; None: the mixture itself is projected, D = A.
        bias (Tensor | None): `[D]`.
        noise (Tensor | None): `[S, K]`.
        oracle (Tensor | None): int64 `[S]`; negative: none.
        oracle_weight (Tensor | None): `[S]`; None: 0.
        temperature (float): divides the scores.
        top_k (int): scores kept; 0: all.

    Returns:
        Outputs: `projected [S, D]` in codebook's dtype, `log_normalizer [S]` and `oracle_nll [S]` float32, `best [S]`
        (the largest score's action), `mixture [S, A]` float32 before the oracle's share, `statistics [5, S]` float32
        (largest score, log of the sum of exp((score - largest) / temperature), the same of the logits, lowest score
        kept; those of the logits only where oracle is given) and `cut [S]`: the last action kept among equals.
    """
    planner = _planner(source, head, head_bias, noise, oracle, temperature, top_k)
    codebook, weight = _dense(codebook), _dense(weight)
    num_sentences, size = planner.num_sentences, 0 if codebook is None else codebook.shape[1]
    plan_size = size if weight is None else weight.shape[0]
    statistics = source.new_empty(5, num_sentences, dtype=torch.float32)
    cut = source.new_empty(num_sentences, dtype=torch.int64)
    mixture = source.new_empty(num_sentences, size, dtype=torch.float32)
    projected = source.new_empty(num_sentences, plan_size, dtype=torch.float32 if codebook is None else codebook.dtype)
    log_normalizer, oracle_nll = torch.empty_like(statistics[0]), torch.empty_like(statistics[0])
    best = torch.empty_like(cut)
    if num_sentences > 0:
        if planner.top_k:
            _find_threshold(planner, statistics, cut)

        def mix(tiles: Tiles) -> tuple[Tensor, Tensor]:
            return _mix(planner, codebook, statistics, cut, tiles)

        operand = source if codebook is None else codebook
        parts, mixture = mix(choose_tiles("mixture_fwd", operand, (planner.num_actions, size), mix))

        def project(tiles: Tiles) -> None:
            outputs = (projected, statistics, cut, log_normalizer, oracle_nll, best)
            _project(planner, parts, mixture, codebook, weight, bias, oracle_weight, outputs, tiles)

        project(choose_tiles("projection_fwd", operand, (size, plan_size), project))
    return projected, log_normalizer, oracle_nll, best, mixture, statistics, cut


def plan_projection_backward(
    grad_projected: Tensor | None,
    grad_log_normalizer: Tensor | None,
    grad_oracle_nll: Tensor | None,
    source: Tensor,
    head: Tensor | None,
    head_bias: Tensor | None,
    codebook: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    noise: Tensor | None,
    oracle: Tensor | None,
    oracle_weight: Tensor | None,
    mixture: Tensor,
    statistics: Tensor,
    cut: Tensor,
    temperature: float,
    top_k: int,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of source, head, head_bias, codebook, weight, bias, noise and oracle_weight, in their dtypes.

    Args:
        grad_projected, grad_log_normalizer, grad_oracle_nll (Tensor | None): of the outputs; None: zero.
        source ... oracle_weight, temperature, top_k: as in the forward.
        mixture, statistics, cut (Tensor): what the forward returned.
        needs (list[bool]): which of the eight to compute; the others come back as empty tensors.
    """
    planner = _planner(source, head, head_bias, noise, oracle, temperature, top_k)
    codebook, weight = _dense(codebook), _dense(weight)
    inputs = (source, head, head_bias, codebook, weight, bias, noise, oracle_weight)
    mixed = grad_projected is not None and codebook is not None
    labelled = oracle is not None
    # Nothing reaches these without a gradient of the plan, the share of the oracle's row without an oracle.
    silent = (False, False, False, not mixed, not mixed, not mixed, False, not (mixed and labelled))
    wanted = [
        None if tensor is None or not need or nothing or planner.num_sentences == 0 else _empty_like(tensor)
        for tensor, need, nothing in zip(inputs, needs, silent, strict=True)
    ]
    grads = _Gradients(*wanted)
    if planner.num_sentences > 0:
        upstream = _Upstream(None, None, grad_log_normalizer, grad_oracle_nll if labelled else None)
        if grad_projected is not None and codebook is not None:
            gradient, parts = _project_backward(
                _dense(grad_projected), planner, mixture, codebook, weight, oracle_weight, grads
            )
            upstream = _Upstream(gradient, parts, grad_log_normalizer, upstream.oracle_nll)
        if grads.reach_scores or grads.codebook is not None:
            _mix_backward(upstream, planner, codebook, oracle_weight, statistics, cut, grads)
    return [
        source.new_empty(0) if tensor is None or not need else torch.zeros_like(tensor) if found is None else found
        for tensor, need, found in zip(inputs, needs, grads.in_order(), strict=True)
    ]
