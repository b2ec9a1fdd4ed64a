"""Noticing that another process of a run has frozen, which no collective does before its own long time is up.

Every process writes a line into the store that torchrun's processes meet at, again and again, and reads that of the
next one, as in a ring. Where that stops changing, this process says so and ends; torchrun then ends the others.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from planlm.ranks import rank, world_size

EVERY = 5.0
"""Seconds between two lines."""

PATIENCE = 300.0
"""Seconds without a new line after which a process counts as frozen; swapping or a slow disk takes up to a minute."""

_LEFT = "left"


class Heartbeat:
    """Says that this process lives and watches over the next one; use as a context manager.

    A process whose main thread alone is stuck still has a heartbeat: that is for the collectives' own time limit.

    Args:
        host, port: where the processes met.
    """

    def __init__(self, host: str, port: int) -> None:
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE)
        )
        self._mine, self._next = (f"planlm/heartbeat/{number % world_size()}" for number in (rank(), rank() + 1))
        self._whom = f"process {(rank() + 1) % world_size()} of {world_size()}"
        self._heard = time.monotonic()
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=work, name="planlm-heartbeat", daemon=True) for work in (self._speak, self._watch)
        ]

    def __enter__(self) -> Heartbeat:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._threads[0].join(1.0)  # not if the store, or who keeps it, has gone

    def _speak(self) -> None:
        """The store's calls may wait as long as they like: `_watch` looks at the clock."""
        number, before = 0, b""
        try:
            while not self._end.wait(EVERY if number else 0.0):
                number += 1
                self._store.set(self._mine, f"{number} process {os.getpid()} on {socket.gethostname()}")
                if not self._store.check([self._next]):
                    continue
                line = self._store.get(self._next)
                if line != before:
                    self._heard, before = time.monotonic(), line
                    self._whom = self._whom.split(" (")[0] + f" ({line.decode().partition(' ')[2]})"
                if line == _LEFT.encode():
                    self._heard = float("inf")
            self._store.set(self._mine, _LEFT)
        except (RuntimeError, OSError):  # whoever keeps the store has ended, and the collectives say so
            self._heard = float("inf")

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._end.wait(EVERY):
            now = time.monotonic()
            if now - looked > 3 * EVERY:  # this process itself was held up, and has not listened
                self._heard = max(self._heard, now)
            looked = now
            if now - self._heard > PATIENCE:
                text = f"{self._whom} has not answered for {PATIENCE:.0f} s, so this one ends too"
                print(f"planlm: error: process {rank()}: {text}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread waits within a collective, out of reach
