"""A step of every kind that a small model can take, timed and written out."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GPT2Config

from benchmarks import step
from benchmarks.harness import read_rows
from benchmarks.step import StepRow


@pytest.mark.parametrize("lm", ["full", "freeze"])
def test_the_command_measures_and_writes(
    lm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GPT2Config(n_layer=3, n_embd=64, n_head=2, vocab_size=100, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    monkeypatch.setitem(step.MODELS, "tiny", config)
    monkeypatch.setitem(step.WINDOWS, "42x2", (42, 2))
    monkeypatch.setattr(step, "matrix_product_rate", lambda *_: 1e11)
    names = ["trainer plain", "eager joint", "planlm plain", "planlm joint"]
    flags = {"models": "tiny", "windows": "42x2", "dtypes": "float32", "lm": lm, "providers": ",".join(names)}
    out = tmp_path / "rows.jsonl"
    command = [f"--{flag}={value}" for flag, value in flags.items()]
    assert step.main([*command, "--repetitions=2", "--no-memory", f"--out={out}"]) == 0
    rows = read_rows(out, StepRow)
    assert [row.provider for row in rows] == [name for name in names if lm == "full" or name not in step.PLAIN]
    printed = capsys.readouterr().out
    for row in rows:
        assert row.provider in printed
        assert row.tokens_per_second == pytest.approx(84 / row.median)
        assert row.memory is None and set(row.over) == {other.provider for other in rows} - {row.provider}
