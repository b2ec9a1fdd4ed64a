"""What progress says where stderr is no terminal."""

from __future__ import annotations

import pytest

from planlm import progress


def test_units_done_before_are_not_in_the_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress("train", 60) as shown:
        shown.start_at(40)
        now[0] += 20
        shown.advance(10, note="loss 2.0")
    first, last = capsys.readouterr().err.splitlines()
    assert first == "train: 50 of 60 (83 %) steps loss 2.0"
    assert last == "train: 10 steps in 20 s (0.5/s) loss 2.0"
