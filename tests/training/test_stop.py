"""Signals that end a run: one finishes the step, a later one acts at once."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from planlm import cli
from planlm.training.loop import _StopSignal


def test_a_signal_sent_twice_at_once_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun passes on what a scheduler sends to every process."""
    with _StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.asked
        monkeypatch.setattr(_StopSignal, "TWICE", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_thread_asks_for_no_signals() -> None:
    """Python lets its main thread alone do so; there, who handled them before does so again."""
    before = signal.getsignal(signal.SIGTERM)

    def work() -> bool:
        assert threading.current_thread() is not threading.main_thread()
        with _StopSignal() as stop:
            return stop.asked

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() is False
        assert pool.submit(cli.main, ["--version"]).result() == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_handlers_that_python_did_not_set_are_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """`signal.signal` gives None for them and does not take it back."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    real, first = signal.signal, {signal.SIGINT, signal.SIGTERM}

    def embedded(number: signal.Signals, handler: object) -> object:
        was = real(number, handler)  # type: ignore[arg-type]
        if number in first:
            first.remove(number)
            return None
        return was

    monkeypatch.setattr(signal, "signal", embedded)
    with _StopSignal():
        pass
    first.add(signal.SIGTERM)
    assert cli.main(["--version"]) == 0
    monkeypatch.undo()
    real(signal.SIGTERM, before[0])
    real(signal.SIGINT, before[1])
