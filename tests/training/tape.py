"""What stands in for a CUDA graph on a CPU: the operators of a computation, recorded once and run again.

As in a graph, what Python has decided is decided for good, tensors are where they were, and random numbers are drawn
anew. As while one is captured, nothing of what is recorded has happened, and to read a number is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal"}
UNSET = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Tape(TorchDispatchMode):
    """Records while it is entered; `undo` puts back what was written to, `play` does all of it."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, schema = kwargs or {}, function._schema
        name = schema.name.partition("::")[2]
        if name in READS:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        for argument, value in zip(schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(value)
        for argument in schema.arguments:
            if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(kwargs[argument.name])
        found = function(*args, **kwargs)
        fresh = [] if any(one.alias_info is not None for one in schema.returns) else _tensors(found)
        self._made |= {one.untyped_storage()._cdata for one in fresh}
        self._calls.append((function, args, kwargs, [] if name in UNSET else fresh))
        return found

    def _keep(self, written: Any) -> None:
        for tensor in _tensors(written):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._made and storage._cdata not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._before[storage._cdata] = whole, whole.clone()

    def undo(self) -> None:
        """Give everything that was there before the values that it had."""
        for whole, before in self._before.values():
            whole.copy_(before)

    def play(self) -> None:
        """Run the operators, each into the memory of its first results."""
        with torch.no_grad():
            for function, args, kwargs, results in self._calls:
                for result, value in zip(results, _tensors(function(*args, **kwargs)), strict=False):
                    result.copy_(value)


class Captures:
    """Stands in for `planlm.training.graphs._Captures`.

    Attributes:
        captured: how many graphs there are.
        replayed: how often one of them ran.
    """

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captured += 1
        tape, drawn = Tape(), torch.get_rng_state()
        with tape:
            found = run()
        tape.undo()
        torch.set_rng_state(drawn)

        def replay() -> Tensor:
            self.replayed += 1
            tape.play()
            return found

        return replay


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
