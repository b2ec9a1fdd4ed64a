"""Signals handled for a while, whatever thread or program this runs in."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


def in_main_thread() -> bool:
    """Whether signals can be handled here: Python hands them to its main thread, and lets no other ask for them."""
    return threading.current_thread() is threading.main_thread()


def ending() -> tuple[signal.Signals, ...]:
    """Signals that ask the process to end: SIGTERM, and SIGHUP of a terminal that closes, unless `nohup` ignores it.

    Under torchrun it is not the terminal's: torchrun, which heeds it whatever `nohup` says, passes it on.
    """
    if not hasattr(signal, "SIGHUP"):
        return (signal.SIGTERM,)
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and "TORCHELASTIC_RUN_ID" not in os.environ
    return (signal.SIGTERM,) if is_ignored else (signal.SIGTERM, signal.SIGHUP)


def terminate(number: int, frame: Any) -> None:
    """Let a signal of `ending` unwind the stack as Ctrl-C does, so that nothing stays half-written.

    A closing terminal often sends its signal twice: by the shell, and by the system once that has gone.
    """
    if number != signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt("terminated")


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
