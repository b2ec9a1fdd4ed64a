"""Planners that predict several actions, towards soft targets, from a limited context: trained, stored, evaluated."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from planlm.config import EvaluateConfig, PlannerConfig, TrainConfig
from planlm.corpus.batches import PlanLoader, SentenceLoader
from planlm.corpus.store import PreparedCorpus
from planlm.evaluation.evaluate import evaluate
from planlm.model.loading import load_model
from planlm.model.planner import Planner
from planlm.report.tables import format_planner
from planlm.training.groups import trainable_groups
from planlm.training.pretrain_planner import Targets, pretrain_planner
from planlm.training.train import train


def planner_settings(planted: dict[str, str], out: Path, **changes: Any) -> PlannerConfig:
    values = {"corpus": planted["corpus"], "out": str(out), "steps": 3, "log_every": 1, "heads": 4, "dropout": 0.0}
    return PlannerConfig(**{**values, **changes})


def test_from_pre_training_to_evaluation(planted: dict[str, str], tmp_path: Path) -> None:
    made = pretrain_planner(
        planner_settings(planted, tmp_path / "planner", horizon=3, context=2, soft_targets=0.1, steps=60, lr=3e-3)
    )
    assert [step["sentences"] for step in made["ahead"]] == [made["sentences"] * (24 - n) // 24 for n in (1, 2)]
    assert made["accuracy@1"] > 0.5, "the most frequent action has .25"
    assert "accuracy@1, 3 sentences ahead" in format_planner(made)
    settings = json.loads((tmp_path / "planner" / "planner" / "planner.json").read_text())
    assert (settings["context"], settings["horizon"]) == (2, 3)
    for kind in ("embeddings", "both"):
        out = tmp_path / kind
        train(
            TrainConfig(
                corpus=planted["corpus"], lm=planted["lm"], out=str(out), planner=made["run"], steps=3, batch_size=4,
                window=32, conditioned_layers=1, precision="fp32", log_every=1, planner_loss=0.5,
                unfreeze_planner_at=0.0, planner_input=kind,
            )
        )  # fmt: skip
        model = load_model(str(out))
        assert model.planner.settings["context"] == 2 and len(model.planner.ahead) == 2
        before = Planner.load(tmp_path / "planner" / "planner")
        assert not torch.equal(model.planner.ahead[1].weight.cpu(), before.ahead[1].weight), "trained jointly too"
        result = evaluate(EvaluateConfig(run=str(out), corpus=planted["corpus"], plans="soft", versus="soft"))
        assert result["planner"]["sentences"] == sum(
            map(len, PreparedCorpus.load(planted["corpus"]).split("test")["actions"])
        )
        assert len(result["planner"]["ahead"]) == 2
        quiet = TrainConfig(corpus="", out="", planner_loss=0.0)
        names = [name for group in trainable_groups(model, quiet, 1) for name in group.parameters]
        assert "planner.head.weight" in names and not any("ahead" in name for name in names)


def test_actions_ahead_are_the_document_s(planted: dict[str, str]) -> None:
    split = PreparedCorpus.load(planted["corpus"]).split("train")
    whole = next(iter(SentenceLoader(split, batch_size=3, shuffle=False)))
    flat = whole.actions.flatten()
    for step in (1, 2):
        at = whole.ahead(step)
        for row, column in (whole.actions >= 0).nonzero().tolist():
            number = int(whole.sentence_positions[row, column])
            assert (at[row, column] >= 0) == (number + step < 24)
            assert number + step >= 24 or flat[at[row, column]] == whole.actions[row, column + step]
    loader = PlanLoader(split, window=20, batch_size=3)
    loader.horizon = 3
    for batch in islice(loader, 2):
        assert batch.plan.actions_ahead is not None
        document, sentence = batch.sentences()
        for segment in range(int(batch.plan.segment_ids.max()) + 1):
            actions = split[int(document[segment])]["actions"][int(sentence[segment]) :][:3]
            found = [int(batch.actions[segment]), *batch.plan.actions_ahead[segment].tolist()]
            assert found == [*actions, *[-1] * (3 - len(actions))]
        assert (batch.unscored().plan.actions_ahead == -1).all()  # type: ignore[operator]


def test_soft_targets_are_the_distances(planted: dict[str, str]) -> None:
    corpus = PreparedCorpus.load(planted["corpus"])
    batch = next(iter(SentenceLoader(corpus.split("train"), batch_size=3, shuffle=False, own_embeddings=True)))
    assert batch.own_embeddings is not None
    labelled = batch.actions >= 0
    at, own = batch.ahead(0)[labelled], batch.own_embeddings[labelled]
    logits = torch.randn(len(own), len(corpus.codebook))
    target = (-torch.cdist(own, corpus.codebook).square() / 0.3).softmax(dim=-1)
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(Targets(corpus.codebook, 0.3).nll(logits, batch, at), expected, rtol=1e-4, atol=1e-4)
    hard = Targets(corpus.codebook, None).nll(logits, batch, at)
    torch.testing.assert_close(Targets(corpus.codebook, 1e-4).nll(logits, batch, at), hard, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{"horizon": 2}, {"soft_targets": 1e-5}, {"context": 100}])
def test_each_option_alone(changes: dict[str, Any], planted: dict[str, str], tmp_path: Path) -> None:
    """Targets as sharp as actions, and a context longer than any document, are what is done without."""
    found = []
    for name, options in (("plain", {}), ("other", changes)):
        pretrain_planner(planner_settings(planted, tmp_path / name, seed=1, **options))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["loss"] for line in lines])
    assert (found[0] == pytest.approx(found[1], rel=1e-4)) == ("horizon" not in changes)
