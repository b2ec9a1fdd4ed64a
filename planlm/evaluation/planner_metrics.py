"""How well the planner predicts the next sentence's action, against baselines without a planner.

Sizes: R sequences of n positions, A dimensions of an embedding, K actions, M sentences of the split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from planlm.corpus.batches import SentenceLoader
from planlm.progress import Progress

if TYPE_CHECKING:
    import datasets

    from planlm.model.planner import Planner

_LOGITS = 1 << 24
"""Logits computed at once: 64 MB in float32, whatever K."""

_BINS = 15
"""Bins of the calibration error (Guo et al., On Calibration of Modern Neural Networks, 2017)."""


@torch.inference_mode()
def planner_metrics(
    planner: Planner, dataset: datasets.Dataset, action_counts: Tensor, *, batch_size: int = 32
) -> dict[str, Any]:
    """Next-action prediction over every sentence of a split, whole documents at a time.

    Args:
        planner: maps sentence embeddings and positions to hidden states, and those to logits by `.head`.
        dataset: a split of a prepared corpus.
        action_counts: how often each action occurs in the training split, `[K]`.
        batch_size: documents at once.

    Returns:
        `accuracy@1`, `accuracy@5`, `accuracy@10`, `mrr` (mean reciprocal rank), `nll` (nats), `ece` (expected
        calibration error of the most probable action, 15 bins), `sentences`, `num_actions`; baselines:
        `unigram_nll` (training frequencies, one added to each count), `unigram_accuracy@1`, and
        `repeat_last_accuracy` (the previous sentence's action; the most frequent one for a document's first).
    """
    device = next(planner.parameters()).device
    was_training = planner.training
    planner.train(False)
    loader = SentenceLoader(dataset, batch_size=batch_size, shuffle=False)
    scores, labels = [], []
    repeated, most_frequent = 0, int(action_counts.argmax())
    with Progress("planner", total=len(dataset), unit="documents") as progress:
        for batch in loader:
            hidden = planner(batch.sentence_embeddings.to(device), batch.sentence_positions.to(device))  # [R, n, A]
            labelled = batch.actions >= 0
            labels.append(batch.actions[labelled])
            scores.append(_rank_sentences(planner, hidden[labelled.to(device)], labels[-1]))
            last = batch.actions.roll(1, dims=1).masked_fill(batch.sentence_positions == 0, most_frequent)
            repeated += int((last == batch.actions)[labelled].sum())
            progress.advance(int((batch.sentence_positions == 0)[labelled].sum()))
    planner.train(was_training)

    rank, nll, confidence = torch.cat(scores, dim=1)  # [M] each
    actions = torch.cat(labels)
    unigram = (action_counts.double() + 1).log() - (action_counts.double() + 1).sum().log()
    return {
        **{f"accuracy@{k}": (rank <= k).double().mean().item() for k in (1, 5, 10)},
        "mrr": (1 / rank).mean().item(),
        "nll": nll.mean().item(),
        "ece": calibration_error(confidence, rank == 1),
        "unigram_nll": -unigram[actions].mean().item(),
        "unigram_accuracy@1": (actions == most_frequent).double().mean().item(),
        "repeat_last_accuracy": repeated / len(actions),
        "sentences": len(actions),
        "num_actions": len(action_counts),
    }


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Mean distance between confidence and accuracy over 15 equal bins of confidence, weighted by their size.

    Args:
        confidence: probability of the predicted action, `[M]`, in (0, 1].
        correct: whether the prediction was right, `[M]` bool.
    """
    bins = (confidence.double() * _BINS).ceil().long().clamp(1, _BINS) - 1  # a bin holds its upper edge
    gap = torch.zeros(_BINS, dtype=torch.float64)
    gap.index_add_(0, bins, confidence.double() - correct.double())
    return (gap.abs().sum() / len(confidence)).item()


def _rank_sentences(planner: Planner, hidden: Tensor, actions: Tensor) -> Tensor:
    """Rank and NLL of the true action and the largest probability, float64 `[3, M]`, for hidden states `[M, A]`."""
    at_once = max(1, _LOGITS // len(planner.head.weight))
    scores = []
    for some_hidden, some_actions in zip(hidden.split(at_once), actions.to(hidden.device).split(at_once), strict=True):
        logits = planner.head(some_hidden).float()  # [m, K]
        true = logits.gather(1, some_actions[:, None])  # [m, 1]
        # Ties go to the lower number, as in argmax: a planner that says nothing must not score 100 %.
        lower = torch.arange(logits.shape[1], device=logits.device) < some_actions[:, None]
        rank = 1 + ((logits > true) | ((logits == true) & lower)).sum(dim=1)
        log_normalizer = logits.logsumexp(dim=1)
        confidence = (logits.amax(dim=1) - log_normalizer).exp()
        scores.append(torch.stack([rank.double(), (log_normalizer - true[:, 0]).double(), confidence.double()]).cpu())
    return torch.cat(scores, dim=1)
