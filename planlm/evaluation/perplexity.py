"""Negative log-likelihood of documents under the model and a plan, by sliding window.

transformers' convention ("Perplexity of fixed-length models"): windows advance by the stride, every token is scored
once, in the first window that reaches it, and no window crosses a document. A document's first token is scored where
the tokenizer put a start token before it: then it is not the first id.

Legend: B windows, W positions, n documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from planlm.corpus.batches import PlanLoader, few_sizes, windows
from planlm.distribution import all_reduce, rank, world_size
from planlm.evaluation.significance import DocumentScores
from planlm.precision import autocast
from planlm.progress import Progress
from planlm.selections import SELECTIONS

if TYPE_CHECKING:
    import datasets

    from planlm.model.modeling import PlanLMForCausalLM

MAX_WINDOW = 1024
"""Default window of LMs with a longer context."""

_WHOLE = 1 << 40
"""A window longer than any document: one window each, which has the document's length."""


def score_documents(
    model: PlanLMForCausalLM,
    dataset: datasets.Dataset,
    *,
    selections: Sequence[str],
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
    precision: str = "fp32",
) -> dict[str, DocumentScores]:
    """Score every token of a split's documents under one or more selections, in one pass over the data.

    NLL is taken in float32 from float32 logits and summed in float64, so results depend on the batch size only by
    the rounding of matrix products.

    Args:
        model: the joint model; left in the mode it was in.
        dataset: a split of a prepared corpus.
        selections: docs/method.md's names; `none` scores the LM alone.
        window: positions W per window, at most the LM's context.
        stride: tokens by which windows advance; default the window.
        batch_size: windows B per forward pass, of all processes together, which share them.
        precision: `fp32`, `bf16` or `auto`.

    Returns:
        Scores over all n documents by selection; a document of one token has none scored.
    """
    # Documents of like length together, and hardly a column that is padding in every window: pad as little as can be.
    whole = windows(dataset, _WHOLE)
    order = whole.document[np.argsort(-whole.length, kind="stable")]  # [n], less the documents of one token
    reads_lm = model.planner_input is not None
    loader = PlanLoader(
        dataset.select(order),
        window=window,
        stride=stride,
        batch_size=batch_size,
        shuffle=False,
        with_others=any(SELECTIONS[selection].needs_others for selection in selections),
        planner_sequence_per_window=reads_lm,
    )
    loader.share = (rank(), world_size())
    nll = torch.zeros(len(selections), len(dataset), dtype=torch.float64)
    tokens = torch.zeros(len(dataset), dtype=torch.int64)
    was_training = model.training
    model.train(False)
    progress = Progress("evaluate", total=loader.num_batches * len(selections), unit="batches")
    with progress, torch.inference_mode(), autocast(precision, model.device):
        for batch in loader:
            documents = torch.from_numpy(order)[batch.documents[:, 0]]  # [B]
            tokens.index_add_(0, documents, (batch.labels != -100).sum(dim=1))
            width = min(window, few_sizes(int((batch.plan.segment_ids >= 0).sum(dim=1).max())))
            on_device = batch.to(model.device)
            plan = dataclasses.replace(on_device.plan, segment_ids=on_device.plan.segment_ids[:, :width])
            for row, selection in enumerate(selections):
                output = model(
                    on_device.input_ids[:, :width],
                    shift_labels=on_device.labels[:, :width],
                    plan=plan,
                    selection=selection,
                    use_cache=False if reads_lm else None,  # so that no layer is computed twice
                )
                nll[row].index_add_(0, documents, output.token_nll.double().sum(dim=1).cpu())
                progress.advance()
    model.train(was_training)
    nll, tokens = all_reduce(nll.to(model.device)).cpu(), all_reduce(tokens.to(model.device)).cpu()
    return {selection: DocumentScores(nll[row].numpy(), tokens.numpy()) for row, selection in enumerate(selections)}
