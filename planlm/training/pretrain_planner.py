"""Pre-training of the planner on next-action prediction (docs/method.md, "Objective and schedules")."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from planlm.config import PlannerConfig
from planlm.corpus.batches import SentenceBatch, SentenceLoader
from planlm.corpus.store import PreparedCorpus
from planlm.distribution import all_reduce, on_rank_zero, rank, world_size
from planlm.errors import InputError
from planlm.evaluation.planner_metrics import planner_metrics
from planlm.files import beside_result, replacing_folder, write_json
from planlm.model.planner import Planner
from planlm.precision import device
from planlm.training.figures import Figures, read_on_cpu
from planlm.training.groups import ParameterGroup
from planlm.training.identity import identify
from planlm.training.loop import Task, fit, num_steps
from planlm.training.parallel import Parallel
from planlm.training.run_directory import Run, check_run
from planlm.training.validation import first_documents, validation


def pretrain_planner(config: PlannerConfig) -> dict[str, Any]:
    """Train a planner on the corpus's training split and measure it on the validation split.

    Writes `planner/` (what `train --planner` loads) and `planner_metrics.json` into the run directory.

    Returns:
        Metrics of the validation split, and where the planner is.

    Raises:
        InputError: no such corpus, or a run directory in use.
    """
    check_run(config)
    corpus = PreparedCorpus.load(config.corpus)
    corpus.split("validation")  # or the measurement at the end would find out
    torch.manual_seed(config.seed)
    action_dim = corpus.manifest.action_dim
    if config.heads is not None and action_dim % config.heads:
        raise InputError(f"--heads {config.heads}: do not divide the {action_dim} channels of {config.corpus}")
    planner = Planner.of_codebook(
        corpus.codebook, config.layers, config.heads, config.dropout, config.context, config.horizon
    )
    planner.to(device()).train()
    soft = config.soft_targets
    loader = SentenceLoader(
        corpus.split("train"), batch_size=config.batch_size, seed=config.seed, own_embeddings=soft is not None
    )
    targets = Targets(corpus.codebook.to(device()), soft)
    held_out = None
    if config.validate_every is not None:
        held_out = SentenceLoader(first_documents(corpus, config), batch_size=config.batch_size, shuffle=False)
        held_out.share = (rank(), world_size())

    loader.share = (rank(), world_size())
    model = Parallel(planner)

    def backward(step: int, batches: list[SentenceBatch]) -> Figures:
        batch = batches[0].to(device())
        count = all_reduce(batch.labelled.new_full((), len(batch.labelled)))
        states = model(**batch.planner_inputs)  # [R, n, A]
        states = states.flatten(0, 1)[batch.labelled]  # [S, A]
        logits, actions = planner.head(states), batch.actions.flatten()[batch.labelled]  # [S, K], [S]
        if soft is None and config.horizon == 1:
            nll = F.cross_entropy(logits, actions, reduction="sum")
        else:
            nll = _horizon_nll(planner, states, logits, batch, targets).sum()
        (nll * world_size() / count).backward()  # gradients are averaged over processes
        right = (logits.argmax(dim=-1) == actions).sum()
        nll_sum, right = all_reduce(torch.stack((nll.detach().double(), right.double())))
        loss = nll_sum / count
        return read_on_cpu({"loss": loss, "planner_loss": loss, "planner_accuracy": right / count, "tokens": count})

    def losses(batch: SentenceBatch) -> tuple[Tensor, Tensor]:
        states = planner(**batch.planner_inputs)
        logits = planner.head(states.flatten(0, 1)[batch.labelled])
        nll = F.cross_entropy(logits, batch.actions.flatten()[batch.labelled], reduction="sum")
        return nll, nll.new_full((), len(batch.labelled))

    group = ParameterGroup("planner", dict(planner.named_parameters()), config.lr)
    task = Task(
        model=model,
        groups=[group],
        loader=loader,
        accumulate=1,
        steps=num_steps(config, loader.num_batches),
        backward=backward,
        validation=validation(config, planner, held_out, losses),
    )
    with Run(config, on_rank_zero(lambda: identify(corpus)), task.steps) as run:
        fit(task, run, config)
        return _finish(planner.eval(), corpus, run, task.validation.best)


class Targets:
    """What is to be predicted of sentences: their actions, or a distribution by the distances to all of them.

    Args:
        codebook: `[K, A]`.
        temperature: of the distribution; None: the actions alone.
    """

    def __init__(self, codebook: Tensor, temperature: float | None) -> None:
        self._codebook, self._temperature = codebook, temperature

    def nll(self, logits: Tensor, batch: SentenceBatch, at: Tensor) -> Tensor:
        """Cross-entropy `[S]` of logits `[S, K]` with sentences, given by where they stand in all sequences."""
        if self._temperature is None:
            return F.cross_entropy(logits, batch.actions.flatten()[at], reduction="none")
        assert batch.own_embeddings is not None
        own = batch.own_embeddings.flatten(0, 1)[at]  # [S, A]
        near = 2 * own @ self._codebook.T - self._codebook.square().sum(dim=1)  # but for |x|^2, which softmax cancels
        return -((near / self._temperature).softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)


def _horizon_nll(planner: Planner, states: Tensor, logits: Tensor, batch: SentenceBatch, targets: Targets) -> Tensor:
    """Cross-entropy `[S]` of each labelled sentence, a mean over those of its horizon that its document has."""
    total, count = targets.nll(logits, batch, batch.labelled), torch.ones(len(logits), device=logits.device)
    for step, head in enumerate(planner.ahead, 1):
        at = batch.ahead(step).flatten()[batch.labelled]
        total = total + targets.nll(head(states), batch, at.clamp(min=0)).where(at >= 0, 0.0)
        count += at >= 0
    return total / count


def _finish(planner: Planner, corpus: PreparedCorpus, run: Run, best: dict[str, Any]) -> dict[str, Any]:
    """Measure the planner and write `planner/`; what `pretrain_planner` returns."""
    validation = corpus.split("validation")

    def finish() -> dict[str, Any]:
        metrics = planner_metrics(planner, validation, corpus.action_counts)
        with replacing_folder(run.path / "planner") as folder:
            planner.cpu().save(folder)
        paths = {"run": str(run.path), "planner": str(run.path / "planner")}
        result = {**paths, "split": "validation", **metrics, **best}
        with beside_result(run.path / "planner_metrics.json"):
            write_json(run.path / "planner_metrics.json", result)
        return result

    return on_rank_zero(finish) or {}
