"""Rows, table, comparison, thresholds and chart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness, kernels
from benchmarks.harness import read_rows, write_rows
from benchmarks.kernels import KernelRow, Threshold, comparison, draw, judged, pooled, table
from planlm.errors import InputError

COMMON = {
    "shape": "gpt2", "dtype": "float32", "flops": 10**9, "bytes": 10**8, "flops_per_s": 1e11, "bytes_per_s": 1e10,
    "repetitions": 5, "over": {}, "process_memory": None, "device": "a processor", "driver": None, "threads": 2,
    "torch": "2", "triton": None, "planlm": "0", "backend": "cpp", "commit": "abc", "date": "2026-01-01T00:00:00+00:00",
}  # fmt: skip


def row(provider: str, milliseconds: float, memory: int = 1000, **changes: Any) -> KernelRow:
    """A result whose p20 and p80 are 10 % from its median."""
    median = milliseconds / 1e3
    times = {"median": median, "p20": 0.9 * median, "p80": 1.1 * median, "min": 0.9 * median}
    return KernelRow(**COMMON | times | {"provider": provider, "memory": memory} | changes)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [row("planlm", 25), row("token-level", 0, status="out of memory")]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl", KernelRow) == rows


def test_rows_of_earlier_versions_are_read() -> None:
    rows = read_rows(Path(__file__).parents[2] / "docs" / "results" / "kernels.jsonl", KernelRow)
    assert rows and all(one.status == "ok" and one.lower_bound > 0 for one in rows)
    assert "Nothing to compare" not in comparison(rows, rows)


def test_a_row_without_times_is_read_where_there_was_no_memory(tmp_path: Path) -> None:
    times = ("median", "p20", "p80", "min", "repetitions", "over", "memory", "process_memory")
    values = {key: value for key, value in vars(row("planlm", 25)).items() if key not in times}
    (tmp_path / "rows.jsonl").write_text(json.dumps(values | {"status": "out of memory"}))
    assert read_rows(tmp_path / "rows.jsonl", KernelRow)[0].status == "out of memory"


def test_a_roofline_overlaps_what_the_lower_bound_adds() -> None:
    one = row("planlm", 4000, flops=20, bytes=4, flops_per_s=10.0, bytes_per_s=4.0)
    assert (one.lower_bound, one.roofline) == (3.0, 2.0 / 4.0)


def test_only_changes_beyond_the_spread_are_flagged() -> None:
    earlier = [row(name, 100) for name in ("A", "B", "C")] + [row("D", 100, device="another")]
    text = comparison([row("A", 70), row("B", 110), row("C", 130), row("D", 500)], earlier)
    verdicts = [line.split()[2:5] for line in text.splitlines()[2:]]
    assert verdicts == [["A", "0.700", "faster"], ["B", "1.100", "same"], ["C", "1.300", "SLOWER"]]


def test_thresholds_are_judged_by_medians_and_skip_what_is_not_there() -> None:
    over = {"strong eager": {"p20": 0.99, "median": 1.04, "p80": 1.07}}
    rows = [row("planlm", 25, memory=10, over=over), row("strong eager", 24, memory=100)]
    thresholds = [
        Threshold("median", "planlm", "lower bound", 1.3, ("gpt2",)),
        Threshold("median", "planlm", "strong eager", 1.0, ("gpt2",)),
        Threshold("memory", "planlm", "strong eager", 0.25, ("gpt2",)),
        Threshold("median", "planlm", "token-level", 0.05, ("gpt2",)),
        Threshold("median", "planlm", "lower bound", 1.0, ("long",)),
    ]
    verdicts = list(judged(rows, thresholds))
    assert [passed for passed, _ in verdicts] == [True, False, True]
    assert verdicts[0][1] == "PASS  gpt2 float32: median 1.25 [1.12, 1.38] × lower bound, at most 1.3"
    assert verdicts[1][1].startswith("FAIL  gpt2 float32: median 1.04 [0.99, 1.07] × strong eager")


def test_processes_are_pooled_by_their_medians() -> None:
    over = [{"strong eager": {"p20": 0.5, "median": value, "p80": 2.0}} for value in (0.9, 1.3, 1.0)]
    rows = [row("planlm", ms, memory=ms, over=ratio) for ms, ratio in zip((30, 20, 24), over, strict=True)]
    other = row("strong eager", 24)
    found, kept = pooled([rows[0], other, *rows[1:]])
    assert kept == other
    assert found.median == 0.024 and found.min == pytest.approx(0.018) and found.memory == 30
    assert 0.02 < found.p20 < 0.024 < found.p80 < 0.03
    assert found.over["strong eager"]["median"] == 1.0 and (found.repetitions, found.processes) == (15, 3)


def test_a_pooled_row_is_one_of_its_own_median_and_can_be_drawn(tmp_path: Path) -> None:
    rates = {30: 1e11, 20: 2.5e10, 24: 5e10}  # the ratios' median is another than the medians' ratio
    (found,) = pooled([row("planlm", ms, flops_per_s=rate) for ms, rate in rates.items()])
    assert found.lower_bound == pytest.approx(0.03) and found.over_bound()["median"] == pytest.approx(0.024 / 0.03)
    draw([found], tmp_path / "chart.png")


def test_a_process_without_a_result_is_one_without_for_all() -> None:
    rows = [row("planlm", 30), row("planlm", 0, status="out of memory"), row("planlm", 20)]
    assert [pool.status for pool in pooled(rows)] == ["out of memory"]


def test_the_table_has_a_line_for_every_row() -> None:
    text = table([row("planlm", 25), row("token-level", 0, status="out of memory")])
    assert "gpt2 float32: lower bound 20.00 ms = 1.00 GFLOP at 0.1 TFLOP/s + 100 MB at 10 GB/s" in text
    assert [line.split()[:2] for line in text.splitlines()[-2:]] == [["planlm", "25.00"], ["token-level", "out"]]


def test_the_command_measures_writes_draws_and_compares(
    measured_here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "rows.jsonl", tmp_path / "chart.png"
    providers = ["token-level", "strong eager", "planlm"]
    command = ["--shapes", "tiny", "--dtypes", "bf16", "--providers", ",".join(providers), "--repetitions", "3"]
    assert kernels.main([*command, "--out", str(out), "--plot", str(plot)]) == 0
    rows = read_rows(out, KernelRow)
    assert [(measured.dtype, measured.provider) for measured in rows] == [("bf16", name) for name in providers]
    for measured in rows:
        assert 0 < measured.min <= measured.p20 <= measured.median <= measured.p80
        assert measured.memory is not None and measured.memory > 0 and measured.repetitions == 3
    assert plot.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert kernels.main([*command, "--compare", str(out)]) == 0
    assert "New over old median" in capsys.readouterr().out


def test_every_case_has_processes_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(function: Callable[..., list[KernelRow]], *arguments: Any) -> list[KernelRow]:
        assert function is kernels.measure
        malloc, dtype, shape, *_ = arguments
        asked.append(f"{shape} {dtype} {malloc}")
        return [replace(row("planlm", 25 + len(asked)), shape=shape, dtype=dtype, malloc=malloc)]

    monkeypatch.setattr(harness, "in_new_process", measured)
    command = ["--shapes", "gpt2,long", "--dtypes", "bf16", "--providers", "planlm", "--malloc", "both"]
    assert kernels.main([*command, "--processes", "3", "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert asked == 3 * ["gpt2 bf16 default", "long bf16 default", "gpt2 bf16 keep", "long bf16 keep"]
    rows = read_rows(tmp_path / "rows.jsonl", KernelRow)
    assert [(one.shape, one.malloc, one.processes) for one in rows[:2]] == [
        ("gpt2", "default", 3),
        ("long", "default", 3),
    ]
    assert rows[0].median == pytest.approx((25 + 5) / 1e3)  # of the first, fifth and ninth process


def test_rows_without_times_are_refused(tmp_path: Path) -> None:
    for bad in ([], {"shape": "gpt2"}, {key: value for key, value in vars(row("planlm", 25)).items() if key != "p20"}):
        (tmp_path / "rows.jsonl").write_text(json.dumps(bad))
        with pytest.raises(InputError, match="row 1 is none that --out wrote"):
            read_rows(tmp_path / "rows.jsonl", KernelRow)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shapes", "gpt3"],
        ["--compare", "missing.jsonl"],
        ["--repetitions", "1"],
        ["--repetitions", "many"],
        ["--seconds", "0"],
        ["--seconds", "inf"],
        ["--processes", "0"],
        ["--plot", "chart.foo"],
        ["--out", "."],
    ],
)
def test_bad_usage_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
