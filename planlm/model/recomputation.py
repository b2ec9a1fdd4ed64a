"""Tensors that the backward pass computes again instead of having them kept.

A matrix product keeps its input for the gradient of its weight. Where the input is a cheap function of what is kept
anyway, as attention's result with the plan added is, keeping it too buys nothing but a pass over memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Recipe:
    """How `made` comes about: `function(x)`, under the autocast that is in force now."""

    def __init__(self, made: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._made, self._made_version = weakref.ref(made), made._version
        self._function, self._x, self._version = function, x.detach(), x._version
        where = x.device.type
        self._autocast = (where, torch.get_autocast_dtype(where), torch.is_autocast_enabled(where))

    def makes(self, kept: Tensor) -> bool:
        """Whether `kept` is the tensor that was made, or a view that begins where it does."""
        made = self._made()
        return (
            made is not None
            and made.data_ptr() == kept.data_ptr()
            and made.dtype == kept.dtype
            and made._version == self._made_version
        )

    def again(self) -> Tensor:
        """The tensor, computed once more."""
        if self._x._version != self._version:
            raise RuntimeError("a tensor was changed in place from which another has to be computed again")
        where, dtype, enabled = self._autocast
        with torch.no_grad(), torch.autocast(where, dtype, enabled=enabled):
            return self._function(self._x)


_Packed = Tensor | tuple[_Recipe, torch.Size, tuple[int, ...]]


class _Recomputation:
    """What autograd asks where a tensor is to be kept. Only the recipe given last counts: its tensor is used next."""

    recipe: _Recipe | None = None

    def pack(self, kept: Tensor) -> _Packed:
        if self.recipe is None or not self.recipe.makes(kept):
            return kept
        return self.recipe, kept.size(), kept.stride()

    @staticmethod
    def unpack(packed: _Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        recipe, size, stride = packed
        return recipe.again().as_strided(size, stride)


_current: ContextVar[_Recomputation | None] = ContextVar("recomputation", default=None)


@contextmanager
def recomputing() -> Iterator[None]:
    """Within it autograd does not keep what was named `recomputable`, nor views of it."""
    recomputation = _Recomputation()
    token = _current.set(recomputation)
    try:
        with saved_tensors_hooks(recomputation.pack, recomputation.unpack):
            yield
    finally:
        _current.reset(token)


def recomputable(made: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Say that `made`, which the next operations take, is `function(x)` of an `x` that is kept in any case.

    Nothing happens outside `recomputing` and under `torch.compile`.

    Args:
        made: not changed in place either, or it is kept after all.
        function: gives the same bits each time.
        x: not changed in place from now on.
    """
    recomputation = None if torch.compiler.is_compiling() else _current.get()
    if recomputation is not None:
        recomputation.recipe = _Recipe(made, function, x)
