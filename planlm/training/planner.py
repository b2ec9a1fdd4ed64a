"""Pre-training of the planner on next-action prediction (docs/method.md, "Objective and schedules")."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F

from planlm.config import PlannerConfig
from planlm.corpus.batches import SentenceBatch, SentenceLoader
from planlm.corpus.store import PreparedCorpus
from planlm.evaluation.planner_metrics import planner_metrics
from planlm.files import write_text
from planlm.model.planner import Planner, codebook_fingerprint, default_heads
from planlm.precision import device
from planlm.training.groups import ParameterGroup
from planlm.training.loop import Task, fit, num_steps
from planlm.training.run import Run


def pretrain_planner(config: PlannerConfig) -> dict[str, Any]:
    """Train a planner on the corpus's training split and measure it on the validation split.

    Writes `planner/` (what `train --planner` loads) and `planner_metrics.json` into the run directory.

    Returns:
        Metrics of the validation split, and where the planner is.

    Raises:
        InputError: no such corpus, or a run directory in use.
    """
    corpus = PreparedCorpus.load(config.corpus)
    validation = corpus.split("validation")
    run = Run(config)
    torch.manual_seed(config.seed)
    action_dim = corpus.manifest.action_dim
    planner = Planner(
        action_dim,
        corpus.manifest.num_actions,
        config.layers,
        config.heads or default_heads(action_dim),
        config.dropout,
        codebook_fingerprint(corpus.codebook),
    )
    planner.initialize_head(corpus.codebook)
    planner.to(device()).train()
    loader = SentenceLoader(corpus.split("train"), batch_size=config.batch_size, seed=config.seed, shuffle=True)

    def backward(step: int, batches: list[SentenceBatch]) -> dict[str, float]:
        batch = batches[0].to(device())
        logits = planner.head(planner(batch.sentence_embeddings)[:, :-1])  # [N, n, K]
        loss = F.cross_entropy(logits.flatten(0, 1), batch.actions.flatten(), ignore_index=-100)
        loss.backward()
        known = batch.actions != -100
        right = (logits.argmax(dim=-1) == batch.actions)[known]
        return {"loss": loss.item(), "planner_loss": loss.item(), "planner_accuracy": right.float().mean().item()}

    group = ParameterGroup("planner", dict(planner.named_parameters()), config.lr)
    task = Task(
        model=planner,
        groups=[group],
        loader=loader,
        accumulate=1,
        steps=num_steps(config, loader.num_batches),
        backward=backward,
        num_tokens=lambda batch: int((batch.actions != -100).sum()),
    )
    fit(task, run, config)
    planner.eval()
    metrics = planner_metrics(planner, validation, corpus.action_counts)
    planner.cpu().save(run.path / "planner")
    result = {"run": str(run.path), "planner": str(run.path / "planner"), "split": "validation", **metrics}
    write_text(run.path / "planner_metrics.json", json.dumps(result, indent=1) + "\n")
    return result
