"""A stacked plan, added to an LM layer by layer.

Autograd hands over the gradient of each layer's columns as a matrix of its own, and then copies all of them side by
side: on CUDA, where the additions are bound by memory, a fortieth of everything that is moved. Triton's segment sums
therefore write into the columns of one matrix.

Sizes: T tokens, S sentences, D plan size (layers stacked), d plan size of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .addition import add_plan
from .backend import Backend, choose
from .checks import check_add_plan, check_segment_ids
from .derivatives import once
from .reference import working_dtype


class StackedPlan:
    """The columns of a projected plan, each layer's to be added by `add`.

    Args:
        projected (Tensor): `plan_projection`'s, `[S, D]`.
        widths (Sequence[int]): each layer's d; their sum is D.

    Attributes:
        plans: each layer's columns.

    Raises:
        ValueError: widths that do not add up to D.
    """

    def __init__(self, projected: Tensor, widths: Sequence[int]) -> None:
        if projected.ndim != 2 or sum(widths) != projected.shape[1]:
            raise ValueError(
                f"widths: got {list(widths)}, needs numbers that add up to the columns of projected, "
                f"{tuple(projected.shape)}"
            )
        backend = choose("add_plan", projected.device, working_dtype(projected))
        self._triton = backend if backend is not None and backend.name == "triton" else None
        self._gradient: _Gradient | None = None
        if len(widths) == 1:
            self.plans: tuple[Tensor, ...] = (projected,)
        elif self._triton and projected.requires_grad and not torch.compiler.is_compiling():
            self._gradient = _Gradient(widths)
            self.plans = _Split.apply(projected, self._gradient)  # type: ignore[no-untyped-call]
        else:  # once: as many slices would each have a gradient of the full width
            self.plans = projected.split(list(widths), dim=1)

    def add(self, layer: int, x: Tensor, segment_ids: Tensor, gate: Tensor | None = None) -> Tensor:
        """`add_plan(x, the layer's plan, segment_ids, gate)`: its arguments, result and errors."""
        plan = self.plans[layer]
        # Compiled code, the LM's alone perhaps, gets the operator: it could not trace where gradients are put.
        plain = self._gradient is None or torch.compiler.is_compiling()
        if plain or working_dtype(x, plan, gate) == torch.float64:
            return add_plan(x, plan, segment_ids, gate)
        check_add_plan(x, plan, segment_ids, gate)
        check_segment_ids(segment_ids, len(plan))
        added: Tensor = _Add.apply(  # type: ignore[no-untyped-call]
            x, plan, segment_ids, gate, self._triton, self._gradient, layer
        )
        return added


class _Gradient:
    """The gradient of a stacked plan while its columns are filled in, in one backward pass."""

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths = list(widths)
        self.starts = [0, *accumulate(widths)]
        self._matrix: Tensor | None = None
        self._taken: set[int] = set()

    def columns(self, layer: int, plan: Tensor) -> Tensor:
        """Where the gradient of this layer goes: its columns or, where they are taken, a matrix of its own.

        They are when a layer's plan was used twice, or an earlier pass has not reached the split.
        """
        if layer in self._taken:
            return plan.new_empty(plan.shape)
        if self._matrix is None:
            self._matrix = plan.new_empty(len(plan), self.starts[-1])
        self._taken.add(layer)
        return self._matrix.narrow(1, self.starts[layer], self.widths[layer])

    def whole(self, gradients: Sequence[Tensor | None], num_sentences: int) -> Tensor | None:
        """The gradient of all columns, from those that arrived: the matrix itself where all of them are in it."""
        matrix, self._matrix = self._matrix, None
        self._taken = set()
        there = [found for found in gradients if found is not None]
        if len(there) == len(gradients) and all(
            matrix is not None and found._base is matrix and found.storage_offset() == start
            for found, start in zip(there, self.starts, strict=False)
        ):
            return matrix
        if not there:
            return None
        return torch.cat(
            [
                there[0].new_zeros(num_sentences, width) if found is None else found
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


class _Add(torch.autograd.Function):
    """`planlm::add_plan` with its gradient for the plan in the columns of one matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plan: Tensor,
        segment_ids: Tensor,
        gate: Tensor | None,
        backend: Backend,
        gradient: _Gradient,
        layer: int,
    ) -> Tensor:
        ctx.operators, ctx.gradient, ctx.layer = backend.operators, gradient, layer
        # Without a gate of the plan only shape and dtype are wanted: its memory is let go.
        kept = plan if gate is not None else plan.new_empty(()).expand(plan.shape)
        ctx.save_for_backward(kept, segment_ids, gate)
        added: Tensor = ctx.operators.add_plan(x, plan, segment_ids, gate)
        return added

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from .triton_addition import add_plan_backward

        plan, segment_ids, gate = ctx.saved_tensors
        to_x, to_plan, _, to_gate, *_ = ctx.needs_input_grad
        grad_plan = grad_gate = None
        if to_plan or to_gate:
            needs = [to_plan, to_gate]
            if torch.is_grad_enabled():  # a second derivative would be asked for: the operator refuses that
                found = ctx.operators.add_plan_backward(grad, plan, segment_ids, gate, needs)
            else:
                columns = ctx.gradient.columns(ctx.layer, plan) if to_plan else None
                found = add_plan_backward(grad, plan, segment_ids, gate, needs, columns)
            grad_plan, grad_gate = found
        grad_x = (once(grad) if torch.is_grad_enabled() else grad) if to_x else None
        return grad_x, grad_plan if to_plan else None, None, grad_gate if to_gate else None, None, None, None
