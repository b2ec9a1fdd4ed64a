"""Throughput of a run, and what it has to do with: utilisation, waiting for data, memory, time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from planlm.progress import process_memory


class Throughput:
    """Measures from one log line to the next; `flops`, `rate` and `steps` are the `Task`'s, `first` steps are done."""

    def __init__(self, flops: Callable[[list[Any]], float] | None, rate: float, first: int, steps: int) -> None:
        self._flops, self._rate = flops, rate
        self._steps, self._done, self._first = steps, first, first
        self._started = time.monotonic()
        self._begin()

    def _begin(self) -> None:
        self._since, self._waited, self._tokens, self._work = time.monotonic(), 0.0, 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent within counts as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent within is none of training's; `seconds` and what is left have it."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    def step(self, tokens: int, batches: list[Any]) -> None:
        """A step over `batches` with so many labelled tokens is done."""
        self._done += 1
        self._tokens += tokens
        if self._flops is not None:
            self._work += self._flops(batches)

    def metrics(self) -> dict[str, float]:
        """For a log line.

        Since the last call: `tokens_per_second`, `waiting` (fraction of the time), `utilisation` (model FLOPs over what
        matrix products reach). Of the whole run: `percent`, `seconds`, `seconds_left`, `memory` (bytes at the peak,
        where the system says).
        """
        now = time.monotonic()
        seconds = max(1e-9, now - self._since)
        each = (now - self._started) / max(1, self._done - self._first)
        found = {
            "percent": round(100 * self._done / self._steps, 1),
            "tokens_per_second": round(self._tokens / seconds, 1),
            "waiting": round(self._waited / seconds, 4),
            "seconds": round(now - self._started, 2),
            "seconds_left": round(each * (self._steps - self._done)),
        }
        memory = peak_memory()
        if memory is not None:
            found["memory"] = memory
        if self._flops is not None:
            found["utilisation"] = round(self._work / seconds / self._rate, 4)
        self._begin()
        return found


def peak_memory() -> int | None:
    """Bytes that this process had at most: of the GPU's memory, or else of the machine's, where the system says."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else process_memory("VmHWM")


def summary(loss: float, metrics: dict[str, float]) -> str:
    """The metrics that one wants to see while waiting, in a line."""
    parts = [f"loss {loss:.4f}", f"{metrics['tokens_per_second']:,.0f} tokens/s"]
    if "utilisation" in metrics:
        parts.append(f"{100 * metrics['utilisation']:.0f} % of matrix-product rate")
    if metrics["waiting"] > 0.01:
        parts.append(f"{100 * metrics['waiting']:.0f} % waiting for data")
    minutes = metrics["seconds_left"] / 60
    left = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.0f} min" if minutes > 2 else f"{60 * minutes:.0f} s"
    if "memory" in metrics:
        parts.append(f"{metrics['memory'] / 1e9:.1f} GB")
    return ", ".join([*parts, f"{left} left"])
