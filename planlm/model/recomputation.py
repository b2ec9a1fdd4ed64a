"""Inputs of matrix products that the backward pass computes again instead of having them kept.

A product keeps its input for the gradient of its weight. Where the input is a cheap function of what is kept anyway, as
attention's result with the plan added is, keeping it too buys nothing but a pass over memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class InputRecomputation:
    """Lets one module, a matrix product, keep its input as the function it comes from.

    Only that module's own tensors pass through autograd's hooks: what keeps its result, as an exponential does, would
    hold itself alive through them.

    Args:
        product: the module.
    """

    def __init__(self, product: nn.Module) -> None:
        self._hooks: saved_tensors_hooks | None = None
        # A function: of a bound method a copied module would have one that leaves what was never entered.
        product.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def enter(self, made: Tensor, function: Callable[[Tensor], Tensor], x: Tensor, *others: Tensor | None) -> None:
        """To be called in a pre-hook of the module: its input `made` is `function(x)`.

        Nothing happens where there is nothing to gain: without gradients, under `torch.compile`, and within other
        hooks of this kind, activation checkpointing's for one.

        Args:
            made: the input, or a view of it.
            function: gives the same bits each time.
            x: kept in any case.
            others: what else the function reads.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:  # type: ignore[attr-defined]
            recipe = _Recipe(made, function, x, others)
            self._hooks = saved_tensors_hooks(recipe.pack, _unpack)
            self._hooks.__enter__()

    def _leave(self) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__()


class _Kept:
    """A tensor, and a check that nobody changed it: autograd's own does not see what passes through hooks."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    def tensor(self) -> Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                "a tensor of shape "
                f"{tuple(self._tensor.shape)} that the backward pass needs was modified by an inplace operation"
            )
        return self._tensor


class _Recipe:
    """How `made` comes about: `function(x)`, under the autocast that is in force now."""

    def __init__(
        self, made: Tensor, function: Callable[[Tensor], Tensor], x: Tensor, others: tuple[Tensor | None, ...]
    ) -> None:
        self._made, self._version = weakref.ref(made), made._version
        self._function, self._x = function, _Kept(x.detach())
        self._others = [_Kept(other.detach()) for other in others if other is not None]
        where = x.device.type
        self._autocast = (where, torch.get_autocast_dtype(where), torch.is_autocast_enabled(where))

    def pack(self, kept: Tensor) -> Any:
        """What autograd keeps of a tensor: of the one that was made, or a view that begins where it does, its shape."""
        made = self._made()
        if (
            made is not None
            and made.data_ptr() == kept.data_ptr()
            and made.dtype == kept.dtype
            and made._version == self._version
        ):
            return self, kept.size(), kept.stride()
        return _Kept(kept)

    def again(self) -> Tensor:
        """The tensor, computed once more."""
        for other in self._others:
            other.tensor()
        where, dtype, enabled = self._autocast
        with torch.no_grad(), torch.autocast(where, dtype, enabled=enabled):
            return self._function(self._x.tensor())


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _Kept):
        return packed.tensor()
    recipe, size, stride = packed
    again: Tensor = recipe.again().as_strided(size, stride)
    return again
