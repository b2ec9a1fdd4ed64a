"""Every file of `examples/` runs, on a tiny corpus and LM, and leaves what it says."""

# ruff: noqa: F811  (the fixture `planted` is imported)

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from planlm.corpus.batches import IGNORED, PlanLoader
from planlm.corpus.collator import PlanCollator
from planlm.corpus.store import PreparedCorpus
from planlm.model import PlanLMForCausalLM
from tests.conftest import HashEncoder
from tests.training.conftest import TypeEncoder, planted  # noqa: F401

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs an example with arguments, in this process, which has the stand-in for the corpus' encoder."""
    monkeypatch.setattr("planlm.model.loading.SentenceEncoder", TypeEncoder)

    def call(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return call


def weights(folder: Path, lm: str) -> tuple[PlanLMForCausalLM, bool, bool]:
    """A model folder, whether its planner has learnt, and whether its LM has."""
    model = PlanLMForCausalLM.from_pretrained(folder)
    base = load_file(Path(lm) / "model.safetensors")
    own = dict(model.lm.named_parameters())
    moved = any(not torch.equal(value, own[name]) for name, value in base.items() if name in own)
    corpus = PreparedCorpus.load(Path(lm).parent / "corpus")
    torch.manual_seed(0)
    fresh = PlanLMForCausalLM.from_lm(lm, corpus.codebook).planner
    head = fresh.head.weight if fresh is not None else None
    assert model.planner is not None and head is not None
    return model, not torch.equal(model.planner.head.weight, head), moved


def test_every_example_is_run_here() -> None:
    named = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text()))
    assert {path.name for path in EXAMPLES.glob("*.py")} == named
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 55


def test_own_loop(run: Callable[..., None], planted: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    run("own_loop.py", planted["corpus"], planted["lm"], str(tmp_path / "out"))
    first, last = map(float, re.findall(r"epoch \d: ([\d.]+) nats", capsys.readouterr().out))
    assert last < first
    _, planner, lm = weights(tmp_path / "out", planted["lm"])
    assert planner and not lm


def test_trainer(run: Callable[..., None], planted: dict[str, str], tmp_path: Path) -> None:
    run("trainer.py", planted["corpus"], planted["lm"], str(tmp_path / "out"))
    _, planner, lm = weights(tmp_path / "out", planted["lm"])
    assert planner and not lm


def test_pipeline(
    run: Callable[..., None], planted: dict[str, str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = PreparedCorpus.load(planted["corpus"])
    model = PlanLMForCausalLM.from_lm(planted["lm"], corpus.codebook, encoder=corpus.manifest.encoder)
    model.save_pretrained(tmp_path / "model")
    prompt = "Rain rain1 rain2."
    monkeypatch.setattr("planlm.model.loading.SentenceEncoder", lambda name: HashEncoder(32))  # an untrained LM's words
    run("pipeline.py", str(tmp_path / "model"), prompt)
    printed = capsys.readouterr().out
    assert printed.count(prompt) == 2 and len(printed) > 2 * len(prompt) + 4


def test_batch_and_stream(
    run: Callable[..., None], planted: dict[str, str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = PreparedCorpus.load(planted["corpus"])
    model = PlanLMForCausalLM.from_lm(planted["lm"], corpus.codebook, encoder=corpus.manifest.encoder)
    model.save_pretrained(tmp_path / "run" / "model")
    monkeypatch.setattr("planlm.model.loading.SentenceEncoder", lambda name: HashEncoder(32))  # an untrained LM's words
    run("batch.py", str(tmp_path / "run"), str(tmp_path / "out.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["harbour", "school", "mill"]
    assert [row["plan"][0]["forced"] for row in rows if row["plan"]] == [None, 0, 1][: len(rows)]
    printed = capsys.readouterr().out
    assert printed.count("actions: ") == 3 and printed.count("nats a token: ") == 3
    torch.manual_seed(0)
    run("stream.py", str(tmp_path / "run" / "model"), "Rain rain1 rain2.")
    printed = capsys.readouterr().out
    assert printed.startswith("Rain rain1 rain2.") and "behind 'Rain rain1 rain2.': action " in printed


def test_peft_lora(run: Callable[..., None], planted: dict[str, str], tmp_path: Path) -> None:
    run("peft_lora.py", planted["corpus"], planted["lm"], str(tmp_path / "out"))
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    rooms = {name.split(".")[2] for name in stored}
    assert rooms == {"lm", "planner", "adapter"}
    linear = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[1] for name in stored if ".lora_" in name}
    assert linear == {"c_attn", "c_proj", "c_fc"}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 8
    _, planner, lm = weights(tmp_path / "out" / "merged", planted["lm"])
    assert planner and lm


def test_accelerate_launch(planted: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    out = str(tmp_path / "out")
    command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(EXAMPLES.parent)
    done = subprocess.run(
        [sys.executable, *command, str(EXAMPLES / "accelerate_train.py"), planted["corpus"], planted["lm"], out],
        env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"of 2 processes: loss ([\d.]+)", done.stdout)]
    collator = PlanCollator(PreparedCorpus.load(planted["corpus"]).split("train"), window=64)
    assert len(losses) == -(-len(collator) // 16)  # each process has its share of the windows
    assert losses[-1] < losses[0]
    _, planner, lm = weights(tmp_path / "out", planted["lm"])
    assert planner and not lm


def test_a_collated_batch_is_the_loaders(planted: dict[str, str]) -> None:
    corpus = PreparedCorpus.load(planted["corpus"])
    split = corpus.split("train")
    collator = PlanCollator(split, window=17)
    batch = next(iter(PlanLoader(split, window=17, batch_size=5, shuffle=False)))
    found = collator(list(range(5)))
    assert torch.equal(found["shift_labels"], batch.labels)
    assert torch.equal(found["labels"][:, 1:], batch.labels[:, :-1]) and (found["labels"][:, 0] == IGNORED).all()
    model = PlanLMForCausalLM.from_lm(planted["lm"], corpus.codebook).eval()
    expected = model(batch.input_ids, **batch.layout, shift_labels=batch.labels, plan=batch.plan).loss
    torch.testing.assert_close(model(**found).loss, expected)
    scored = sum(int((collator([window])["shift_labels"] != IGNORED).sum()) for window in range(len(collator)))
    assert scored == sum(len(ids) - 1 for ids in split["input_ids"]), "every token is a label once"
