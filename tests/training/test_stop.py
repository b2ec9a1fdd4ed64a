"""Signals that end a run: one finishes the step, a later one acts at once."""

from __future__ import annotations

import signal

import pytest

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
