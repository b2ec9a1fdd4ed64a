"""What a run would take: arithmetic over its phases, what is counted, what GPUs are predicted to need."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from planlm import cli
from planlm.config import PlanBudgetConfig, TrainConfig
from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError, MachineError
from planlm.model import loss
from planlm.report.budget import format_budget
from planlm.training import budget
from planlm.training.counted import Counter, count
from planlm.training.gpus import GPUS, Work, due, memory, pass_seconds, predict, reduce_seconds
from planlm.training.loop import join
from planlm.training.measured import _counts, phases
from planlm.training.train import build

H200 = next(gpu for gpu in GPUS if gpu.name.startswith("H200"))


def train_config(**changes: Any) -> TrainConfig:
    return TrainConfig(corpus="c", out="r", **changes)


def work(**changes: Any) -> Work:
    """GPT-2-small, joint, as it is counted of `benchmarks.step`'s on a CPU."""
    counts = {
        "trained": 131_734_144, "not_trained": 0, "copied": 0, "largest_layer": 7_087_872, "outside_layers": 46_679_680,
        "vocabulary": 50257, "launches": 842, "moved": 3.1796e6, "moved_once": 3.75e9, "kept": 354_329,
        "kept_once": 3.39e8,
        "flops": 13.071e12 / 16384, "sequences": 160.0, "steps": 10, "validation_batches": 0,
    }  # fmt: skip
    return Work(**counts | changes)


SMOLLM2 = {
    "trained": 145_061_824, "vocabulary": 49152, "launches": 2249, "moved": 6.9423e6, "moved_once": 3.63e9,
    "kept": 718_793, "kept_once": 3.47e8, "flops": 14.959e12 / 16384,
}  # fmt: skip
OLMO_1B = {
    "trained": 1_192_140_672, "vocabulary": 50304, "launches": 1266, "moved": 14.232e6, "moved_once": 25.17e9,
    "kept": 1_712_153, "kept_once": 25.9e8, "flops": 61.139e12 / 8192,
}  # fmt: skip


# Extrapolation


def measured(**changes: Any) -> dict[str, Any]:
    """A run of 100 steps whose planner joins at the 40th, with 32 sequences in a step but in an epoch's last one."""
    found = {
        "start": 10.0,
        "warm_up": [3.0, 1.0],
        "phases": [
            {"steps": 40, "seconds": [1.0, 1.0], "tokens": 4000.0, "sequences": 32.0},
            {"steps": 60, "seconds": [1.5, 2.5], "tokens": 4000.0, "sequences": 32.0},
        ],
        "validation": 4.0,
        "checkpoint": 5.0,
        "end": 2.0,
        "memory": 3e9,
        "work": {"sequences": 3200.0, "steps": 100, "trained": {"lm": 7, "planner": 2}, "not_trained": 1},
    }
    return found | changes


def test_each_phase_counts_with_its_own_steps() -> None:
    found = budget.extrapolated(measured(), train_config(validate_every=30, checkpoint_every=50))
    assert found["parts"] == {
        "start": 12.0,  # two seconds of warm-up beyond two steps
        "steps from 0 on": 40.0,
        "steps from 40 on": 120.0,
        "validation": 16.0,  # after 30, 60, 90 and the last step
        "checkpoints": 30.0,  # after 50 and 100, and each of those four
        "end": 2.0,
    }
    assert found["seconds"] == sum(found["parts"].values())
    assert found["error"] == pytest.approx(2 * 60 * 0.5)  # of the second phase: 60 steps, each 2 ± .71 / sqrt(2)
    assert [phase["from"] for phase in found["phases"]] == [0, 40]
    assert found["phases"][1]["tokens_per_second"] == 2000.0


def test_steps_of_fewer_sequences_take_less() -> None:
    half = measured(work={**measured()["work"], "sequences": 1600.0})
    found = budget.extrapolated(half, train_config())
    assert found["parts"]["steps from 40 on"] == 60.0 and found["error"] == pytest.approx(30.0)


def test_one_step_says_nothing_of_the_spread() -> None:
    phases = [{"steps": 100, "seconds": [2.0], "tokens": 4000.0, "sequences": 32.0}]
    assert budget.extrapolated(measured(phases=phases), train_config())["error"] is None


@pytest.mark.parametrize(("steps", "every", "times"), [(10, None, 0), (10, 3, 4), (9, 3, 3), (2, 500, 1)])
def test_what_is_due(steps: int, every: int | None, times: int) -> None:
    assert due(steps, every) == times


# Counted


def test_operators_their_bytes_and_what_is_kept() -> None:
    x, weight = torch.randn(8, 4), nn.Parameter(torch.randn(4, 4))
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    def forward() -> torch.Tensor:
        return (x @ weight).exp().view(-1).sum()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = count(forward, tokens=8)
    own = {one.untyped_storage().data_ptr(): one.nbytes for one in kept if one.shape == (8, 4) and one is not x}
    own.pop(x.untyped_storage().data_ptr(), None)
    assert sum(own.values()) == 8 * 4 * 4, "exp keeps its result"
    assert found.kept == 8 * 4 * 4 + 4, "and the loss"
    # mm, exp, sum; ones, mul by the result, mm
    assert found.launches == 6
    products = 2 * (128 + 128 + 64)
    assert found.moved == products + (128 + 128) + (128 + 4) + (4 + 4) + (4 + 128 + 128)
    assert weight.grad is not None


def test_memory_that_is_gone_is_not_kept() -> None:
    with Counter() as counter:
        one = torch.zeros(1000)
        view = one[:10]
        one.add_(1.0)
        assert counter.alive == 4000
        del one
        assert counter.alive == 4000, "a view holds all of it"
        del view
        assert counter.alive == 0


# Predicted


@pytest.mark.parametrize(
    ("changes", "batch_size", "window", "milliseconds", "gigabytes"),
    [({}, 16, 1024, 39.5, 8.87), (SMOLLM2, 16, 1024, 62.9, 15.29), (OLMO_1B, 4, 2048, 137.7, 37.30)],
    ids=["GPT-2-small", "SmolLM2", "OLMo-1B"],
)
def test_steps_on_an_h200_are_what_was_measured(
    changes: dict[str, Any], batch_size: int, window: int, milliseconds: float, gigabytes: float
) -> None:
    """Joint steps in graphs: gpu-h200-torch213.json's times, and memory as it was reserved.

    GPT-2-small's memory is that of live tensors, measured on an H200 before; reserved were 9.5 GB.
    """
    row = predict(work(**changes), train_config(window=window, batch_size=batch_size), H200, 1)
    assert 1e3 * row["seconds_per_step"] == pytest.approx(milliseconds, rel=0.05)
    assert row["memory"] / 1e9 == pytest.approx(gigabytes, rel=0.05)
    assert row["steps"] == 10
    assert row["tokens_per_second"] == pytest.approx(batch_size * window / row["seconds_per_step"])


def test_without_graphs_a_step_waits_for_its_host() -> None:
    small = train_config(window=128, batch_size=8)
    assert predict(work(**SMOLLM2), small, H200, 1)["limit"] == "launches"
    for config, number in ((dataclasses.replace(small, graph="never"), 1), (small, 8)):
        row = predict(work(**SMOLLM2), config, H200, number)
        assert row["limit"] == "host" and row["seconds_per_step"] > 2249 * 10e-6


def test_gpus_share_a_run() -> None:
    config = train_config(window=1024, batch_size=16)
    one, eight, many = (predict(work(), config, H200, number) for number in (1, 8, 64))
    assert (eight["batch_size"], eight["steps"]) == (128, 2) and (many["batch_size"], many["steps"]) == (1024, 1)
    assert 6 < eight["tokens_per_second"] / one["tokens_per_second"] < 8.001
    assert reduce_seconds(work(), H200, 1) == 0
    assert reduce_seconds(work(), H200, 64) == pytest.approx(2 * 63 / 64 * 4 * 131_734_144 / 40e9)
    assert predict(work(trained=4_000_000_000), config, H200, 64)["limit"] == "communication"
    four = predict(work(sequences=640.0), dataclasses.replace(config, accumulate=4), H200, 64)
    assert four["tokens_per_second"] > many["tokens_per_second"], "gradients are reduced once in four passes"


def test_a_batch_is_no_larger_than_the_corpus() -> None:
    config = {"window": 1024, "lm_mode": "full"}
    filled, larger = (
        predict(work(sequences=160.0, steps=10), train_config(batch_size=size, **config), H200, 1)
        for size in (16, 4000)
    )
    assert larger == filled and filled["batch_size"] == 16


def test_memory_is_weights_gradients_moments_and_what_is_kept() -> None:
    plain = work(trained=100, not_trained=10, copied=7, kept=3.0, kept_once=5.0, vocabulary=11)
    states = 4 * 110 + 8 * 100 + 4 * 7
    assert memory(plain, 20, keeps_gradients=False) == states + max(5 + 60 + 2 * 20 * 11, 400)
    assert memory(plain, 20, keeps_gradients=True) == states + 5 + 60 + 2 * 20 * 11 + 400
    sharded = memory(work(), 16384, keeps_gradients=True, shards=8)
    assert sharded < memory(work(), 16384, keeps_gradients=True) - 12 * 0.75 * 131_734_144 + 4 * 61e6
    assert pass_seconds(work(), H200, 10, fp32=True)["products"] > 10 * pass_seconds(work(), H200, 10)["products"]


# The command


def test_the_run_without_a_plan_is_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"lm_mode": "full", "window": 64, "batch_size": 5, "steps": 9, "kl": 0.5, "precision": "fp32"}
    plan = {"planner": "p", "planner_loss": 0.5, "oracle_mix": "1:0", "gate": True, "temperature": 2.0}
    found = budget.without_plan(train_config(**settings, **plan))
    assert found == train_config(**settings, selection="none")
    frozen = budget.without_plan(train_config(conditioned_layers=1))
    assert frozen == train_config(conditioned_layers=1, selection="fixed")
    built = {"conditioning": "embedding", "gate": True, "planner_input": "lm", "planner_lm_layers": 1}
    assert budget.without_plan(train_config(**built)) == train_config(**built, selection="fixed"), "built as what plans"
    monkeypatch.setattr(budget, "joint_config", lambda lm: lm or None)
    joint = budget.without_plan(train_config(**built, lm="joint", lm_mode="full", planner="p", temperature=2.0))
    assert joint == train_config(**built, lm="joint", lm_mode="full", selection="none"), "it stays as it was built"
    assert budget.without_plan(train_config(**built, lm_mode="full")) == train_config(lm_mode="full", selection="none")
    assert budget.without_plan(train_config(selection="fixed")) is None
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert fields >= budget.OF_THE_PLAN, "settings that train has"


def shown_of(joint: dict[str, Any], plain: dict[str, Any] | None) -> list[str]:
    """The lines of time and rate, as words."""
    config = train_config()
    one, other = budget.extrapolated(joint, config), plain and budget.extrapolated(plain, config)
    facts = {"steps": 100, "batch_size": 32, "window": 128, "selection": "soft", "device": "a CPU", "gpus": []}
    found = format_budget({"joint": one, "plain": other, "compared_with": plain and "none", **facts})
    return [" ".join(line.split()) for line in found.splitlines() if line.startswith(("time ", "tokens/s"))]


def test_what_planning_adds_is_said_with_its_error_or_not_at_all() -> None:
    two = measured()["phases"]
    half = [phase | {"seconds": [second / 2 for second in phase["seconds"]]} for phase in two]
    time, rate = shown_of(measured(), measured(phases=half))
    # 179 and 100 s, of which 19 and 20 are no steps; 1.79 times (60 / 179 and 30 / 100, squared, added, the root of it)
    assert time == "time 3 min ± 60 s 100 s ± 30 s +79.0% ± 80.5% measured"
    assert rate == "tokens/s, at the end 2,000 4,000 −50.0% measured"
    single = [phase | {"seconds": phase["seconds"][:1]} for phase in two]
    time, rate = shown_of(measured(phases=single), measured())
    assert time == "time 2 min 3 min ± 60 s unknown measured"
    assert rate == "tokens/s, at the end 2,667 2,000 unknown measured"
    assert shown_of(measured(), None) == ["time 3 min ± 60 s measured", "tokens/s, at the end 2,000 measured"]


def test_a_batch_is_counted_without_what_an_earlier_one_left(
    planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "run")
    config = TrainConfig(corpus=planted["corpus"], lm=planted["lm"], window=16, batch_size=4, out=out, lm_mode="full")
    built = build(config)
    for begin, _ in phases(built.task):
        join(built.task, begin, is_first=True)
    _counts(built, config)  # what is looked at once is counted here
    built.parallel.model.zero_grad()
    before = _counts(built, config)
    monkeypatch.setattr(loss, "CHUNK", 1 << 16)  # nor in more chunks of the loss: a GPU has one of so few tokens
    assert any(parameter.grad is not None for parameter in built.parallel.model.parameters())
    assert _counts(built, config) == before


@pytest.fixture
def words(planted: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(budget, "SECONDS", 0.1)
    return ["plan-budget", "--corpus", planted["corpus"], "--lm", planted["lm"], "--window", "16", "--batch-size", "4"]


def test_the_options_of_train_become_a_budget(
    planted: dict[str, str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    more = ["--lm-mode", "full", "--steps", "50", "--validate-every", "20", "--out", str(tmp_path / "run"), "--json"]
    assert cli.main([*words, *more, "--rehearsal", planted["corpus"]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    joint, plain = found["joint"], found["plain"]
    assert found["steps"] == 50 and [phase["steps"] for phase in joint["phases"]] == [20, 30]
    assert [phase["steps"] for phase in plain["phases"]] == [50] and found["compared_with"] == "none"
    assert set(joint["trained"]) == {"adapter", "bias", "codebook", "planner", "lm"} and set(plain["trained"]) == {"lm"}
    assert joint["trained"]["codebook"] == PreparedCorpus.load(planted["corpus"]).codebook.numel()
    assert joint["trained"]["lm"] == plain["trained"]["lm"] and joint["not_trained"] == 0
    assert all(joint["parts"][name] > 0 for name in ("start", "steps from 0 on", "validation", "checkpoints", "end"))
    assert joint["memory"] is None or joint["memory"] > 1e8
    assert len(found["gpus"]) == 9 and all(row["seconds"] > 0 and row["memory"] > 0 for row in found["gpus"])
    shown = format_budget(found)
    assert all(len(line) <= 80 for line in shown.splitlines()), shown
    assert "64 × H100" in shown and "planning adds" in shown


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--selection", "none"], "--selection none with --lm-mode freeze trains nothing"),
        (["--window", "500"], "--window 500: the context"),
        (["--top-k", "3"], "--top-k is for --selection top-k"),
    ],
)
def test_what_train_refuses_is_one_line(
    words: list[str], more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, *more]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("planlm: error: ") and says in last


def test_a_full_disk_is_one_line_that_says_where(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"import sys; from planlm import cli; sys.exit(cli.main({words!r}))"
    limited = f"ulimit -f 20; exec {sys.executable} -c {shlex.quote(code)}"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = subprocess.run(["sh", "-c", limited], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr and not list(tmp_path.glob("planlm-*"))
    assert "no space left on the disk" in last and f"go to {tmp_path}: set TMPDIR to a larger folder" in last


def test_no_file_of_the_working_folder_is_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "datasets.py").write_text("raise SystemExit('not the library')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    assert cli.main([*words, "--steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


def test_a_measurement_that_is_killed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed:
        returncode = -9

    monkeypatch.setattr(budget.subprocess, "run", lambda *_, **__: Killed())
    with pytest.raises(MachineError, match=r"was killed by signal 9: too little memory\?"):
        budget.plan_budget(PlanBudgetConfig(corpus="c"))
    with pytest.raises(InputError, match="--top-k"):
        budget.plan_budget(PlanBudgetConfig(corpus="c", top_k=3))
