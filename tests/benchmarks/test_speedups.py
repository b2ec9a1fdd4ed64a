"""The table of docs/speedups.md, measured."""

from __future__ import annotations

import pytest

from benchmarks import harness, speedups
from benchmarks.speedups import PIECES
from benchmarks.step import Case


def test_each_piece_is_a_line_off_and_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measured: list[str] = []

    def in_new_process(function: object, case: Case, off: str) -> tuple[float, float]:
        measured.append(off)
        return (2.0 if off == "attention" else 1.0), 3.0

    monkeypatch.setattr(harness, "in_new_process", in_new_process)
    assert speedups.main(["--models", "gpt2", "--windows", "1024x4", "--lm", "full", "--processes", "2"]) == 0
    assert measured == ["nothing", *PIECES] * 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == list(PIECES)
    assert "2.00 : 1.00 s | 3.00 : 3.00 GB" in lines[2 + PIECES.index("attention")]
