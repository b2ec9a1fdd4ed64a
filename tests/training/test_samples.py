"""Samples while a run trains: training does not notice, they are what `generate` writes, and none is written twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from planlm.config import GenerateConfig, TrainConfig
from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError
from planlm.kernels import environment
from planlm.model.generation import generate
from planlm.training.objective import Objective
from planlm.training.train import train
from tests.conftest import HashEncoder

from . import small

ROOT = Path(__file__).parents[2]

NOISY = {"selection": "gumbel", "oracle_mix": "0.5", "lm_dropout": 0.1, "unfreeze_planner_at": 0.2}
"""Everything that has a random state or a mode: noise, sampled oracles, dropout in planner and LM."""


def settings(planted: dict[str, str], out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {"steps": 6, "checkpoint_every": 3, "sample_every": 2, "planner_lr": 1e-3}
    return small.settings(planted, out, **usual | changes)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planlm.model.loading.SentenceEncoder", lambda name: HashEncoder(32))
    monkeypatch.setattr("planlm.training.train.matrix_product_rate", lambda *_: 1e9)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """A file of prompts, one with a plan."""
    rows = [{"prompt": "Rain rain0 rain1. Boat", "id": "a"}, {"prompt": "Mill mill1", "plan": [2, "*"]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "prompts.jsonl")


def samples(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {"lm_mode": "freeze"},
        {"lm_mode": "lora", "checkpoint_activations": True},
        {"lm_mode": "full", "kl": 0.5, "validate_every": 3},
        {"lm_mode": "full", "conditioning": "insert", "planner_input": "both"},
    ],
    ids=["freeze", "lora", "full", "insert"],
)
def test_training_is_what_it_is_without(changes: dict[str, Any], planted: dict[str, str], tmp_path: Path) -> None:
    train(settings(planted, tmp_path / "without", **NOISY | changes, sample_every=None))
    train(settings(planted, tmp_path / "with", **NOISY | changes, sample_every=1))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    states = [load_file(tmp_path / name / "checkpoints/step-6/tensors.safetensors") for name in ("with", "without")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "with/model" / file).read_text() == (tmp_path / "without/model" / file).read_text()
    assert {sample["step"] for sample in samples(tmp_path / "with")} == {1, 2, 3, 4, 5, 6}


@pytest.mark.skipif(environment.compiler_program(default="g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_stays_compiled_for_training_alone(planted: dict[str, str], tmp_path: Path) -> None:
    torch.compiler.reset()
    counted = []
    for every in (None, 1):
        torch._dynamo.utils.counters.clear()
        train(settings(planted, tmp_path / str(every), compile=True, steps=2, sample_every=every))
        counted.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        torch.compiler.reset()
    assert counted[0] == counted[1] > 0
    assert losses(tmp_path / "None") == losses(tmp_path / "1")


def test_they_are_what_generate_writes(planted: dict[str, str], prompts: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(settings(planted, out, lm_mode="full", lm_lr=1e-2, sample_prompts=prompts, seed=3))
    found = samples(out)
    assert [(one["step"], one.get("id")) for one in found] == [
        (2, "a"),
        (2, None),
        (4, "a"),
        (4, None),
        (6, "a"),
        (6, None),
    ]
    last = generate(GenerateConfig(run=str(out), prompts=prompts, max_new_tokens=32, seed=3))["results"]
    for sample, result in zip(found[-2:], last, strict=True):
        assert {key: result[key] for key in sample if key != "step"} == {k: v for k, v in sample.items() if k != "step"}
    assert found[1]["plan"][0]["forced"] == 2 and found[1]["plan"][0]["label"]
    assert len({one["text"] for one in found[::2]}) > 1, "the model changes"


def test_by_default_the_validation_split_begins_them(
    planted: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings(planted, tmp_path / "run", steps=2))
    held_out = PreparedCorpus.load(planted["corpus"]).split("validation")
    firsts = [row["text"][: row["sentence_spans"][0][1]] for row in held_out.select(range(3))]
    assert [one["prompt"].strip() for one in samples(tmp_path / "run")] == firsts
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sample after step 2: ")]
    assert [line.split(": ")[1].split(" >>> ")[0] for line in shown] == firsts
    assert all(len(line) <= 130 for line in shown)


@pytest.mark.parametrize("stop_at", [1, 3, 4, 5])
def test_a_resumed_run_writes_each_once(
    stop_at: int, planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before or after a sample that no checkpoint follows."""
    train(settings(planted, tmp_path / "whole"))
    backward = Objective.backward

    def dying(self: Objective, step: int, batches: list[Any]) -> Any:
        if step == stop_at:
            raise RuntimeError("killed")
        return backward(self, step, batches)

    monkeypatch.setattr(Objective, "backward", dying)
    with pytest.raises(RuntimeError, match="killed"):
        train(settings(planted, tmp_path / "cut"))
    monkeypatch.setattr(Objective, "backward", backward)
    train(settings(planted, tmp_path / "cut", resume=True))
    assert samples(tmp_path / "cut") == samples(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_resumed_run_may_ask_for_others(planted: dict[str, str], prompts: str, tmp_path: Path) -> None:
    config = settings(planted, tmp_path / "run")
    train(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    train(replace(config, sample_every=1, sample_prompts=prompts, resume=True))
    assert [one["step"] for one in samples(tmp_path / "run")] == [2, 2, 2, 4, 4, 5, 5, 6, 6]


def test_tensorboard_shows_them(planted: dict[str, str], tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(settings(planted, tmp_path / "run", tracker="tensorboard"))
    board = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    found = board.Tensors("samples/0/text_summary")
    first = samples(tmp_path / "run")[::3]
    assert [(one.step, one.tensor_proto.string_val[0].decode()) for one in found] == [
        (one["step"], one["prompt"] + one["text"]) for one in first
    ]


def test_several_processes_write_what_one_does(planted: dict[str, str], prompts: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nimport planlm.model.loading as loading\nfrom planlm import cli\n"
        "from tests.conftest import HashEncoder\nloading.SentenceEncoder = lambda name: HashEncoder(32)\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    for size in (1, 2):
        run = settings(planted, tmp_path / str(size), sample_prompts=prompts, lm_mode="full")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(run)))
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", str(program),
             "train", "--config", str(tmp_path / "config.yaml")],
            capture_output=True, text=True, timeout=300, cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("sample after step 2: ") == 2
    found = [samples(tmp_path / size) for size in ("1", "2")]
    assert [(one["step"], one["prompt"]) for one in found[0]] == [(one["step"], one["prompt"]) for one in found[1]]
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_every": None, "sample_prompts": "p.txt"}, r"^--sample-prompts is for --sample-every; set that too$"),
        ({"sample_prompts": "nowhere.txt"}, r"^--sample-prompts nowhere.txt: no such file$"),
        ({"sample_prompts": "nowhere.csv"}, r"^--sample-prompts nowhere.csv: expected a .txt file"),
        ({"selection": "oracle"}, r"^--sample-every: --selection oracle has no plan for a text yet to be written"),
        ({"selection": "shuffled", "planner_loss": 0.1}, r"^--sample-every: --selection shuffled has no plan"),
        ({"shard": True}, r"^--sample-every: with --shard no process has the whole model"),
    ],
)
def test_what_cannot_be_is_said_before_training(
    changes: dict[str, Any], message: str, planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if changes.get("shard"):
        monkeypatch.setattr("planlm.training.samples.world_size", lambda: 2)
    with pytest.raises(InputError, match=message) as raised:
        train(settings(planted, tmp_path / "run", **changes))
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


def test_an_encoder_that_is_gone_is_said_before_training(
    planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(name: str) -> Any:
        raise InputError(f"{name}: no such folder")

    monkeypatch.setattr("planlm.model.loading.SentenceEncoder", gone)
    with pytest.raises(InputError, match="types: no such folder"):
        train(settings(planted, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
