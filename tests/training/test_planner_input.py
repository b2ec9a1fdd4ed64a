"""Training and evaluating a planner that reads the LM's states."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from planlm.config import EvaluateConfig, PlannerConfig, TrainConfig
from planlm.corpus.batches import PlanLoader
from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError
from planlm.evaluation.evaluate import evaluate
from planlm.model import PlanLMForCausalLM
from planlm.training.objective import Objective
from planlm.training.pretrain_planner import pretrain_planner
from planlm.training.train import train

KINDS = ("lm", "both")


def settings(planted: dict[str, str], out: Path, **changes: Any) -> TrainConfig:
    values = {
        "corpus": planted["corpus"], "lm": planted["lm"], "out": str(out), "steps": 4, "batch_size": 4, "window": 32,
        "conditioned_layers": 1, "precision": "fp32", "log_every": 1, "checkpoint_every": 2, "lm_mode": "full",
        "planner_loss": 0.1, "unfreeze_planner_at": 0.3,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_and_is_evaluated(
    kind: str, planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = pretrain_planner(PlannerConfig(corpus=planted["corpus"], out=str(tmp_path / "planner"), steps=2))["run"]
    how = {"planner": planner, "planner_input": kind}
    train(settings(planted, tmp_path / "whole", **how))
    backward = Objective.backward

    def dying(self: Objective, step: int, batches: list[Any]) -> dict[str, float]:
        if step == 3:
            raise RuntimeError("killed")
        return backward(self, step, batches)

    monkeypatch.setattr(Objective, "backward", dying)
    with pytest.raises(RuntimeError, match="killed"):
        train(settings(planted, tmp_path / "cut", **how))
    monkeypatch.undo()
    train(settings(planted, tmp_path / "cut", **how, resume=True))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)
    assert whole["planner_input.projection.weight"].abs().sum() > 0
    rows = []
    for batch_size in (1, 7):  # another batch has other windows of the document in it
        result = evaluate(
            EvaluateConfig(
                run=str(tmp_path / "cut"), corpus=planted["corpus"], plans="soft,fixed", window=32,
                batch_size=batch_size, bootstrap=2,
            )
        )  # fmt: skip
        rows.append([row["nll"] for row in result["rows"]])
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-6)


def test_a_window_is_planned_alike_in_every_batch(planted: dict[str, str]) -> None:
    corpus = PreparedCorpus.load(planted["corpus"])
    model = PlanLMForCausalLM.from_lm(planted["lm"], corpus.codebook, conditioned_layers=1, planner_input="lm").eval()
    found = []
    for size in (1, 6):
        loader = PlanLoader(
            corpus.split("test"), window=20, batch_size=size, shuffle=False, planner_sequence_per_window=True
        )
        with torch.no_grad():
            batches = list(islice(loader, 6 // size))
            assert size == 1 or len(torch.unique(batches[0].documents)) < 4, "several windows of a document"
            outputs = [model(batch.input_ids, plan=batch.plan, use_cache=False) for batch in batches]
        counts = [int(batch.plan.segment_ids.max()) + 1 for batch in batches]
        found.append(torch.cat([output.action_logits[:count] for output, count in zip(outputs, counts, strict=True)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"planner_input": "lm", "freeze_planner": True}, "--planner-input lm: its projection starts untrained"),
        ({"planner_input": "both", "selection": "hard", "planner_loss": 0.0}, "--planner-input both"),
        ({"planner_input": "lm", "unfreeze_planner_at": 1.0}, "--unfreeze-planner-at 1"),
        ({"planner_lm_layers": 2}, "--planner-lm-layers is for --planner-input"),
    ],
)
def test_contradictions(changes: dict[str, Any], says: str, planted: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        train(settings(planted, tmp_path / "run", **changes))
