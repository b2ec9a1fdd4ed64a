"""How well the planner predicts the next sentence's action, against baselines without a planner.

Sizes: R sequences of n positions, A dimensions of an embedding, K actions, M sentences of the split.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from planlm.corpus.batches import PlanLoader, SentenceLoader
from planlm.model.states import read_states
from planlm.progress import Progress

if TYPE_CHECKING:
    import datasets

    from planlm.model.modeling import PlanLMForCausalLM
    from planlm.model.planner import Planner

_LOGITS = 1 << 24
"""Logits computed at once: 64 MB in float32, whatever K."""

_BINS = 15
"""Bins of the calibration error (Guo et al., On Calibration of Modern Neural Networks, 2017)."""


EXAMPLE, EXPECTED, LONGEST = 12, 3, 400
"""Sentences of the document that `followed` shows, actions of each, and characters."""

Predicted = Iterator[tuple[Tensor, Tensor]]
"""Batches of planner states `[M, A]` of sentences, and the actions `[M, N]` from them on, negative for none."""


@torch.inference_mode()
def planner_metrics(
    planner: Planner,
    dataset: datasets.Dataset,
    action_counts: Tensor,
    *,
    batch_size: int = 32,
    predicted: Predicted | None = None,
) -> dict[str, Any]:
    """Next-action prediction over every sentence of a split, whole documents at a time.

    Args:
        planner: maps sentence embeddings and positions to hidden states, and those to logits by `.head` and `.ahead`.
        dataset: a split of a prepared corpus.
        action_counts: how often each action occurs in the training split, `[K]`.
        batch_size: documents at once.
        predicted: each sentence once; by default the planner makes the states from embeddings.

    Returns:
        `accuracy@1`, `accuracy@5`, `accuracy@10`, `mrr` (mean reciprocal rank), `nll` (nats), `ece` (expected
        calibration error of the most probable action, 15 bins), `calibration` (see `calibration`), `sentences`,
        `num_actions`; baselines:
        `unigram_nll` (training frequencies, one added to each count), `unigram_accuracy@1`, and
        `repeat_last_accuracy` (the previous sentence's action; the most frequent one for a document's first). With a
        longer horizon `ahead`, `accuracy@1`, `nll` and `sentences` of each step behind the first.
    """
    was_training = planner.training
    planner.train(False)
    heads = (planner.head, *planner.ahead)
    scores: list[list[Tensor]] = [[] for _ in heads]
    labels = []
    with Progress("planner", total=None, unit="batches") as progress:
        for hidden, actions in predicted or _whole_documents(planner, dataset, batch_size):
            labels.append(actions[:, 0].cpu())
            for step, head in enumerate(heads):
                known = actions[:, step] >= 0
                scores[step].append(_rank_sentences(head, hidden[known], actions[known, step]))
            progress.advance()
    planner.train(was_training)

    most_frequent = int(action_counts.argmax())
    (rank, nll, confidence), *later = (torch.cat(of_step, dim=1) for of_step in scores)  # [M] each
    actions = torch.cat(labels)
    unigram = (action_counts.double() + 1).log() - (action_counts.double() + 1).sum().log()
    ahead = [
        {"accuracy@1": (one[0] == 1).double().mean().item(), "nll": one[1].mean().item(), "sentences": one.shape[1]}
        for one in later
        if one.shape[1]
    ]
    return {
        **{f"accuracy@{k}": (rank <= k).double().mean().item() for k in (1, 5, 10)},
        "mrr": (1 / rank).mean().item(),
        "nll": nll.mean().item(),
        "ece": calibration_error(bins := calibration(confidence, rank == 1)),
        "calibration": bins,
        "unigram_nll": -unigram[actions].mean().item(),
        "unigram_accuracy@1": (actions == most_frequent).double().mean().item(),
        "repeat_last_accuracy": _repeat_last(dataset, most_frequent),
        "sentences": len(actions),
        "num_actions": len(action_counts),
        **({"ahead": ahead} if ahead else {}),
    }


def _whole_documents(planner: Planner, dataset: datasets.Dataset, batch_size: int) -> Predicted:
    """What the planner makes of embeddings, whole documents at a time."""
    device = next(planner.parameters()).device
    for batch in SentenceLoader(dataset, batch_size=batch_size, shuffle=False):
        batch = batch.to(device)
        labelled, flat = batch.actions >= 0, batch.actions.flatten()
        places = [batch.ahead(step)[labelled] for step in range(len(planner.ahead) + 1)]
        actions = torch.stack([flat[at.clamp(min=0)].where(at >= 0, -1) for at in places], dim=1)
        yield planner(**batch.planner_inputs)[labelled], actions


def window_predictions(model: PlanLMForCausalLM, dataset: datasets.Dataset, window: int, batch_size: int) -> Predicted:
    """What a planner that reads the LM's states makes of them, each sentence in the first window that shows it."""
    loader = PlanLoader(dataset, window=window, batch_size=batch_size, shuffle=False, planner_sequence_per_window=True)
    assert model.planner is not None
    loader.horizon = len(model.planner.ahead) + 1
    seen: set[tuple[int, int]] = set()
    for batch in loader:
        document, sentence = (of_segment.tolist() for of_segment in batch.sentences())
        is_new = []
        for key, action in zip(zip(document, sentence, strict=True), batch.actions.tolist(), strict=True):
            is_new.append(action >= 0 and key not in seen)
            seen.add(key)
        new = torch.tensor(is_new, device=model.device)
        batch = batch.to(model.device)
        call = {"input_ids": batch.input_ids, "position_ids": None, "attention_mask": None, "past_key_values": None}
        inputs, *_ = read_states(model.lm, (model.state_layers, 0), batch.plan, call | {"inputs_embeds": None})
        states = model.planner_states(inputs)
        actions = batch.actions[:, None]
        if batch.plan.actions_ahead is not None:
            actions = torch.cat((actions, batch.plan.actions_ahead), dim=1)
        yield states[new], actions[new]


def _repeat_last(dataset: datasets.Dataset, most_frequent: int) -> float:
    """Accuracy of the previous sentence's action."""
    repeated = total = 0
    for actions in dataset.with_format("numpy", columns=["actions"])["actions"]:
        repeated += int((actions[1:] == actions[:-1]).sum()) + int(actions[0] == most_frequent)
        total += len(actions)
    return repeated / total


def calibration(confidence: Tensor, correct: Tensor) -> list[dict[str, Any]]:
    """Mean `confidence`, `accuracy` and number of `sentences` in each of 15 equal bins of confidence that has some.

    Args:
        confidence: probability of the predicted action, `[M]`, in (0, 1].
        correct: whether the prediction was right, `[M]` bool.
    """
    bins = (confidence.double() * _BINS).ceil().long().clamp(1, _BINS) - 1  # a bin holds its upper edge
    count, sure, right = torch.zeros(3, _BINS, dtype=torch.float64)
    count.index_add_(0, bins, torch.ones_like(confidence, dtype=torch.float64))
    sure.index_add_(0, bins, confidence.double())
    right.index_add_(0, bins, correct.double())
    return [
        {"confidence": c / n, "accuracy": r / n, "sentences": int(n)}
        for n, c, r in zip(count.tolist(), sure.tolist(), right.tolist(), strict=True)
        if n
    ]


def calibration_error(bins: list[dict[str, Any]]) -> float:
    """Mean distance between confidence and accuracy of what `calibration` gives, weighted by sentences."""
    gaps = (one["sentences"] * abs(one["confidence"] - one["accuracy"]) for one in bins)
    return float(sum(gaps) / sum(one["sentences"] for one in bins))


@torch.inference_mode()
def followed(planner: Planner, dataset: datasets.Dataset, temperature: float) -> dict[str, Any]:
    """A document of a split sentence by sentence, with what the planner expected of each before it was read.

    Args:
        planner: from embeddings.
        dataset: a split of a prepared corpus.
        temperature: of the distribution.

    Returns:
        `id` of the first document with at least `EXAMPLE` sentences, or else the first, and `sentences`, the first
        `EXAMPLE`: `sentence`, its `action`, and `expected`, the most probable ones with their `probability`.
    """
    every = dataset.with_format("numpy", columns=["actions"])["actions"]
    number = next((at for at, actions in enumerate(every) if len(actions) >= EXAMPLE), 0)
    document = dataset.with_format(None)[number]
    (batch,) = SentenceLoader(dataset.select([number]), batch_size=1, shuffle=False)
    labelled = batch.actions >= 0
    was_training = planner.training
    planner.train(False)
    hidden = planner(**batch.to(next(planner.parameters()).device).planner_inputs)[labelled][:EXAMPLE]
    probabilities = (planner.head(hidden).float() / temperature).softmax(dim=-1)
    values, likely = probabilities.topk(min(EXPECTED, probabilities.shape[1]))
    planner.train(was_training)
    spans = document["sentence_spans"][:EXAMPLE]
    sentences = [
        {
            "sentence": document["text"][begin : min(end, begin + LONGEST)],
            "action": action,
            "expected": [{"action": a, "probability": round(p, 4)} for a, p in zip(actions, given, strict=True)],
        }
        for (begin, end), action, actions, given in zip(
            spans, document["actions"], likely.tolist(), values.tolist(), strict=False
        )
    ]
    return {"id": document["id"], "sentences": sentences}


def _rank_sentences(head: nn.Module, hidden: Tensor, actions: Tensor) -> Tensor:
    """Rank and NLL of the true action and the largest probability, float64 `[3, M]`, for hidden states `[M, A]`."""
    at_once = max(1, _LOGITS // len(head.weight))  # type: ignore[arg-type]
    scores = []
    for some_hidden, some_actions in zip(hidden.split(at_once), actions.to(hidden.device).split(at_once), strict=True):
        logits = head(some_hidden).float()  # [m, K]
        true = logits.gather(1, some_actions[:, None])  # [m, 1]
        # Ties go to the lower number, as in argmax: a planner that says nothing must not score 100 %.
        lower = torch.arange(logits.shape[1], device=logits.device) < some_actions[:, None]
        rank = 1 + ((logits > true) | ((logits == true) & lower)).sum(dim=1)
        log_normalizer = logits.logsumexp(dim=1)
        confidence = (logits.amax(dim=1) - log_normalizer).exp()
        scores.append(torch.stack([rank.double(), (log_normalizer - true[:, 0]).double(), confidence.double()]).cpu())
    return torch.cat(scores, dim=1)
