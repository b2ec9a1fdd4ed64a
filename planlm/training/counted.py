"""What a step asks of any device, counted while one runs on this one: operators, bytes they move, memory they keep.

The operators are torch's and PlanLM's own, the same on a CPU as on CUDA but for details: an operator is taken for one
launch, which reads the distinct elements of its inputs once and writes its results once. Views and allocations are
free. What attention moves is not counted: its arithmetic takes longer.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = {
    "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "detach_", "alias",
    "lift_fresh", "_unsafe_view", "_reshape_alias", "resolve_conj", "resolve_neg",
}  # fmt: skip
"""Operators that launch nothing, apart from views."""

GATHERS = {"embedding", "index_select", "index", "gather"}
"""Operators that read of their first argument no more than they write."""


class Counter(TorchDispatchMode):
    """Counts what runs within it, forward and backward.

    Attributes:
        launches: operators, but for those that launch nothing.
        moved: bytes read and written by all but attention.
        alive: bytes of the tensors made within that are still there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.moved = self.alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = [leaf.untyped_storage()._cdata for leaf in tensors_of((args, kwargs))]
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        reads, writes = tensors_of((args, kwargs)), tensors_of(result)
        for tensor in writes:
            self._watch(tensor, before)
        if name in FREE or function.is_view or not (reads or writes):
            return result
        self.launches += 1
        if "attention" not in name:
            if name in GATHERS:
                self.moved += min(bytes_of(reads[0]), sum(map(bytes_of, writes)))
                reads = reads[1:]
            self.moved += sum(map(bytes_of, (*reads, *writes)))
        return result

    def _watch(self, tensor: Tensor, before: list[int]) -> None:
        """Count the memory of a result until nobody has it any more, unless it is an argument's."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in before:
            return
        self._known.add(key)
        self.alive += storage.nbytes()
        weakref.finalize(storage, self._release, key, storage.nbytes()).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


@dataclass(frozen=True)
class Counts:
    """Of one forward and backward pass.

    Attributes:
        tokens: positions of the batch.
        launches: of operators.
        moved: bytes.
        kept: bytes that the forward pass keeps for the backward one, with weights in the dtype of the products.
    """

    tokens: int
    launches: int
    moved: int
    kept: int


def count(forward: Callable[[], Tensor], tokens: int) -> Counts:
    """Run `forward`, which gives a loss, and its backward pass; gradients stay where they are."""
    with Counter() as counter:
        loss = forward()
        kept = counter.alive
        loss.backward()  # type: ignore[no-untyped-call]
    return Counts(tokens, counter.launches, counter.moved, kept)


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: an expanded dimension counts once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size if stride != 0 or size == 0 else 1 for size, stride in sizes) * tensor.itemsize


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors among an operator's arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
