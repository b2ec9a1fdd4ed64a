"""Each token's plan added to its LM state: `y[t] = x[t] + gate * plan[segment_ids[t]]`.

The ids are sorted, so the backward with respect to `plan` is a segment sum in a fixed order. For the layers of a
`StackedPlan` autograd would hand over the gradient of each layer's columns as a matrix of its own, and then copy all of
them side by side: on CUDA, where the additions are bound by memory, a fortieth of everything that is moved. Triton's
segment sums therefore write into the columns of one matrix.

Sizes: T tokens, S sentences, D plan size of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backend import choose, full_precision
from .checks import check_add_plan, check_segment_ids
from .operators import first_derivative_only
from .reference import working_dtype


def add_plan(x: Tensor, plan: Tensor, segment_ids: Tensor, gate: Tensor | None = None) -> Tensor:
    """Add to every token the plan of its segment.

    Computed in float32 for half-precision inputs and rounded once; deterministic, forward and backward, on every
    backend. Differentiable in x, plan and gate, once.

    Args:
        x (Tensor): LM states, `[T, D]`.
        plan (Tensor): one row per segment, `[S, D]`; any strides, so a column slice of a stacked projection will do.
        segment_ids (Tensor): each token's row of `plan`, int64 `[T]`; never falling, apart from -1: that token's state
            is returned bit for bit.
        gate (Tensor | None): multiplies the plan, `[D]`.

    Returns:
        Tensor: `[T, D]`, in x's dtype.

    Raises:
        ValueError: a wrong argument, by name. The values of `segment_ids` are checked on CPU only.
        RuntimeError: a second derivative was asked for.
    """
    check_add_plan(x, plan, segment_ids, gate)
    backend = choose("add_plan", x.device, working_dtype(x, plan, gate))
    if backend is None or backend.name != "cpp":
        check_segment_ids(segment_ids, len(plan))
    if backend is not None:
        states, plan = x.to(backend.vectors(x.dtype)), plan.to(backend.vectors(plan.dtype))
        added: Tensor = backend.add_plan(states, plan, segment_ids, gate)
        return added.to(x.dtype)
    with full_precision(x.device):
        x, plan, gate = first_derivative_only(x), first_derivative_only(plan), first_derivative_only(gate)
        return reference.add_plan(x, plan, segment_ids, gate)


class StackedPlan:
    """The columns of a projected plan, each layer's to be added by `add`.

    Args:
        projected (Tensor): `plan_projection`'s, `[S, D of all layers]`.
        widths (Sequence[int]): each layer's D; they add up to projected's.
        segment_bounds (Tensor | None): where the tokens of each segment lie, int32 `[S + 1]`: those of segment s are in
            `bounds[s]:bounds[s + 1]`, tokens without a segment anywhere among them. None: found where they are needed.

    Attributes:
        plans: each layer's columns.

    Raises:
        ValueError: widths that do not add up.
    """

    def __init__(self, projected: Tensor, widths: Sequence[int], segment_bounds: Tensor | None = None) -> None:
        if projected.ndim != 2 or sum(widths) != projected.shape[1]:
            raise ValueError(
                f"widths: got {list(widths)}, needs numbers that add up to the columns of projected, "
                f"{tuple(projected.shape)}"
            )
        backend = choose("add_plan", projected.device, working_dtype(projected))
        # What is compiled could not trace where gradients are put.
        eager = backend is not None and backend.is_eager
        self._gradient = gradient = _Gradient(widths, segment_bounds) if eager else None
        if len(widths) == 1:
            self.plans: tuple[Tensor, ...] = (projected,)
        elif gradient is not None and projected.requires_grad:
            self.plans = _Split.apply(projected, gradient)  # type: ignore[no-untyped-call]
        else:  # once: as many slices would each have a gradient of the full width
            self.plans = projected.split(list(widths), dim=1)

    def add(self, layer: int, x: Tensor, segment_ids: Tensor, gate: Tensor | None = None) -> Tensor:
        """`add_plan(x, the layer's plan, segment_ids, gate)`: its arguments, result and errors."""
        plan = self.plans[layer]
        # Compiled code, the LM's alone perhaps, gets the operator.
        if self._gradient is None or torch.compiler.is_compiling() or torch.float64 in (x.dtype, plan.dtype):
            return add_plan(x, plan, segment_ids, gate)
        check_add_plan(x, plan, segment_ids, gate)
        check_segment_ids(segment_ids, plan.shape[0])
        return self._gradient.add(x, plan, segment_ids, gate, self._gradient, layer)


class _Gradient:
    """The gradient of a stacked plan while its columns are filled in, in one backward pass; and all layers' bounds."""

    def __init__(self, widths: Sequence[int], bounds: Tensor | None) -> None:
        from .triton_addition import AddPlan

        self.widths, self.add, self._bounds = list(widths), AddPlan.apply, bounds
        self.starts = [0, *accumulate(widths)]
        self._matrix: Tensor | None = None
        self._taken: set[int] = set()
        self._found: tuple[Tensor, Tensor] | None = None

    def columns(self, layer: int, like: Tensor, dtype: torch.dtype, num_segments: int) -> Tensor | None:
        """Where the gradient of a layer's plan goes: its columns or, where they are taken, nowhere in particular.

        They are when a layer's plan was used twice, or an earlier pass has not reached the split.
        """
        if layer in self._taken or len(self.widths) == 1:
            return None
        if self._matrix is None:
            self._matrix = like.new_empty(num_segments, self.starts[-1], dtype=dtype)
        self._taken.add(layer)
        return self._matrix.narrow(1, self.starts[layer], self.widths[layer])

    def bounds(self, segment_ids: Tensor, num_segments: int) -> Tensor:
        """Bounds of these ids, made once for all layers that share them."""
        if self._bounds is not None:
            return self._bounds
        if self._found is None or self._found[0] is not segment_ids:
            from .triton_addition import segment_bounds

            self._found = segment_ids, segment_bounds(segment_ids, num_segments)
        return self._found[1]

    def whole(self, gradients: Sequence[Tensor | None], num_sentences: int) -> Tensor | None:
        """The gradient of all columns, from those of the layers: the matrix itself where all of them are in it."""
        matrix, self._matrix = self._matrix, None
        self._taken = set()
        present = [found for found in gradients if found is not None]
        if len(present) == len(gradients) and all(
            matrix is not None and found._base is matrix and found.storage_offset() == start
            for found, start in zip(present, self.starts, strict=False)
        ):
            return matrix
        if not present:
            return None
        return torch.cat(
            [
                present[0].new_zeros(num_sentences, width) if found is None else found
                for found, width in zip(gradients, self.widths, strict=True)
            ],
            dim=1,
        )


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, gradient: _Gradient) -> tuple[Tensor, ...]:
        ctx.gradient, ctx.num_sentences = gradient, len(projected)
        ctx.set_materialize_grads(False)
        return projected.split(gradient.widths, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return ctx.gradient.whole(gradients, ctx.num_sentences), None
