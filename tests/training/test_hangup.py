"""A terminal that closes while a run is at work in it, as a lost connection does."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from planlm import signals


def begin(planted: dict[str, str], out: Path, terminal: int) -> subprocess.Popen[bytes]:
    """A run of more steps than anybody waits for, with this terminal as its own."""

    def own() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "planlm", "train", "--corpus", planted["corpus"], "--lm", planted["lm"]]
    settings = {"--out": out, "--steps": 100_000, "--batch-size": 2, "--window": 16, "--log-every": 1}
    command += [str(part) for pair in settings.items() for part in pair]
    return subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=own)


def test_a_run_whose_terminal_closes_leaves_a_checkpoint(planted: dict[str, str], tmp_path: Path) -> None:
    ours, its = pty.openpty()
    process = begin(planted, tmp_path / "run", its)
    os.close(its)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    os.set_blocking(ours, False)
    while not (metrics.is_file() and metrics.read_text().count("\n") > 2) and time.monotonic() < until:
        assert process.poll() is None
        try:
            os.read(ours, 65536)
        except BlockingIOError:
            time.sleep(0.05)
    os.close(ours)
    assert process.wait(timeout=60) == 1
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/tensors.safetensors"))


def test_a_hangup_sent_twice_ends_once() -> None:
    """What runs on the way out, as the wait for other processes does, is not torn by the second."""
    with signals.handling(signals.terminate, signal.SIGHUP):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)


def test_nohup_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    for before, found in ((signal.SIG_DFL, {signal.SIGTERM, signal.SIGHUP}), (signal.SIG_IGN, {signal.SIGTERM})):
        monkeypatch.setattr(signal, "getsignal", lambda number, before=before: before)
        assert set(signals.ending()) == found
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # whose own handler passes the signal on, with nohup too
    assert set(signals.ending()) == {signal.SIGTERM, signal.SIGHUP}
