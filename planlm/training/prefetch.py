"""Batches made, and brought to where they are used, while the step before them runs."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any, Protocol

from planlm.precision import CPU
from planlm.training.transport import Transport


class Loader(Protocol):
    """Batches of one epoch at a time, with a position that can be stored."""

    epoch: int

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Prefetch:
    """Batches without end, epoch after epoch, from the loader's position on; use as a context manager.

    A thread of its own makes them: collating is numpy and page reads, which release the GIL.

    Args:
        loader: used by the thread alone until the end.
        ahead: batches that are made before they are asked for.
        transport: brings them to the device; by default they stay on the CPU.

    Attributes:
        position: of the loader after the last batch that was taken, for a checkpoint.
    """

    def __init__(self, loader: Loader, ahead: int, transport: Transport | None = None) -> None:
        self.position = loader.state_dict()
        self._loader, self._transport = loader, transport or Transport(CPU)
        self._ready: queue.Queue[tuple[Any, dict[str, Any]] | BaseException] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="planlm-loader", daemon=True)

    def __enter__(self) -> Prefetch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                while True:  # it may wait for room in the queue
                    self._ready.get_nowait()
            self._thread.join(0.05)

    def __next__(self) -> Any:
        """The next batch; raises what went wrong in making it."""
        found = self._ready.get()
        if isinstance(found, BaseException):
            raise found
        batch, self.position = found
        return self._transport.receive(batch)

    def _produce(self) -> None:
        try:
            while True:
                for batch in self._loader:
                    self._ready.put((self._transport.send(batch), self._loader.state_dict()))
                    if self._stop.is_set():
                        return
                self._loader.epoch += 1
        except BaseException as error:  # for whoever asks for the batch
            self._ready.put(error)
