"""Figures of steps that stay on the device until somebody looks: to read one, the host waits for all it has asked for.

Figures are numbers by name, dictionaries of such among them; what a device has computed is a tensor of one element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Figures = dict[str, Any]

MAX_SKIPPED = 10
"""Steps in a row with a non-finite gradient after which training stops: the state is beyond recovery by skipping."""

MAX_UNREAD = 100
"""Steps after which the host looks whether they were skipped, if nothing has had it look: a wait in so many is none."""


def read(figures: Figures) -> Figures:
    """The same with a number for each tensor, by one copy from the device."""
    tensors = list(_tensors(figures))
    numbers = iter(torch.stack([tensor.double() for tensor in tensors]).tolist() if tensors else ())

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(inner) for name, inner in value.items()}
        return next(numbers) if isinstance(value, Tensor) else value

    found: Figures = filled(figures)
    return found


def read_on_cpu(figures: Figures) -> Figures:
    """`read` where everything lies on a CPU, so that nobody waits; else the figures as they are."""
    return read(figures) if all(tensor.device.type == "cpu" for tensor in _tensors(figures)) else figures


def not_finite(figures: Iterable[float | Tensor], device: torch.device) -> Tensor:
    """float32 `[]` on the device: 1 where any of these is NaN or infinite, else 0, as the fused optimiser takes it."""
    values = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in figures]
    return torch.stack(values).isfinite().all().logical_not().float()


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, Tensor):
        yield value


class Ledger:
    """Labels seen and steps skipped, of a run's steps as far as they have been read from the device.

    Args:
        step, tokens, skipped: steps done, labels seen in them, and how many of the last ones were skipped in a row.
        say: is told of each step that was skipped.

    Attributes:
        step, tokens, skipped: as of the newest `read`; after `MAX_SKIPPED` in a row no step is counted any more.
    """

    def __init__(self, step: int, tokens: int, skipped: int, say: Callable[[str], None]) -> None:
        self.step, self.tokens, self.skipped, self._say = step, tokens, skipped, say
        self._unread: list[Figures] = []

    def note(self, *, skipped: Tensor, tokens: float | Tensor) -> bool:
        """A step is done, `skipped` or not; whether it is time to read that, as it is at once on a CPU."""
        self._unread.append({"skipped": skipped, "tokens": tokens})
        return skipped.device.type == "cpu" or len(self._unread) >= MAX_UNREAD

    def read(self, figures: Figures) -> Figures:
        """`figures` of the newest step in numbers, and all that was noted with them."""
        found = read({**figures, "": dict(enumerate(self._unread))})
        self._unread = []
        for step in found.pop("").values():
            if self.skipped >= MAX_SKIPPED:
                break
            self.step, self.tokens = self.step + 1, self.tokens + int(step["tokens"])
            self.skipped = self.skipped + 1 if step["skipped"] else 0
            if self.skipped:
                self._say(f"step {self.step}: non-finite loss or gradient, step skipped ({self.skipped} in a row)")
        return found
