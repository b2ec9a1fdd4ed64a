"""Signals handled for a while, whatever thread or program this runs in."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


def in_main_thread() -> bool:
    """Whether signals can be handled here: Python hands them to its main thread, and lets no other ask for them."""
    return threading.current_thread() is threading.main_thread()


def ending() -> tuple[signal.Signals, ...]:
    """Signals that ask the process to end: SIGTERM, and SIGHUP of a terminal that closes, unless `nohup` ignores it."""
    if not hasattr(signal, "SIGHUP") or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return (signal.SIGTERM,)
    return (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], None], *numbers: signal.Signals) -> Iterator[None]:
    """Let `handler` have these signals for a while, and then who had them before; nothing outside the main thread."""
    before = {number: signal.signal(number, handler) for number in numbers} if in_main_thread() else {}
    try:
        yield
    finally:
        for number, previous in before.items():
            # None: whoever embeds Python handles the signal, and nothing here can put that back.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
