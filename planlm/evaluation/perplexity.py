"""Negative log-likelihood of documents under the model and a plan, by sliding window.

transformers' convention ("Perplexity of fixed-length models"): windows advance by the stride, every token is scored
once, in the first window that reaches it, and no window crosses a document. A document's first token is scored where
the tokenizer put a start token before it: then it is not the first id.

Legend: B windows, W positions, n documents, S segments, K actions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from planlm.corpus.batches import IGNORED, PlanBatch, PlanLoader, windows
from planlm.corpus.offsets import few_sizes
from planlm.corpus.sentence_rng import uniform_by_sentence
from planlm.distribution import all_reduce, rank, world_size
from planlm.evaluation.breakdown import POSITION_EDGES, POSITIONS, SplitScores
from planlm.plan_inputs import PlanInputs
from planlm.precision import autocast
from planlm.progress import Progress
from planlm.selections import SELECTIONS

if TYPE_CHECKING:
    import datasets

    from planlm.model.modeling import PlanLMForCausalLM
    from planlm.model.output import PlanLMOutput

MAX_WINDOW = 1024
"""Default window of LMs with a longer context."""

SAMPLED = "sampled"
"""A row of evaluation's own: several plans drawn for each sentence, and the LM's probabilities averaged."""

_WHOLE = 1 << 40
"""A window longer than any document: one window each, which has the document's length."""


@dataclass(frozen=True)
class Sampling:
    """How the row `sampled` is made.

    Attributes:
        num_plans: actions drawn for each sentence, from `softmax(z / temperature)`; the LM's probabilities of each
            token are averaged over them.
        seed: of the draws, which belong to document and sentence.
    """

    num_plans: int = 8
    seed: int = 0


def score_documents(
    model: PlanLMForCausalLM,
    dataset: datasets.Dataset,
    *,
    selections: Sequence[str],
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
    precision: str = "fp32",
    sampling: Sampling = Sampling(),
) -> dict[str, SplitScores]:
    """Score every token of a split's documents under one or more selections, in one pass over the data.

    NLL is taken in float32 from float32 logits and summed in float64, so results depend on the batch size only by
    the rounding of matrix products.

    Args:
        model: the joint model; left in the mode it was in.
        dataset: a split of a prepared corpus.
        selections: docs/method.md's names; `none` scores the LM alone; or `sampled`.
        window: positions W per window, at most the LM's context.
        stride: tokens by which windows advance; default the window.
        batch_size: windows B per forward pass, of all processes together, which share them.
        precision: `fp32`, `bf16` or `auto`.
        sampling: of the row `sampled`.

    Returns:
        Scores over all n documents by selection; a document of one token has none scored.
    """
    # Documents of like length together, and hardly a column that is padding in every window: pad as little as can be.
    whole = windows(dataset, _WHOLE)
    order = whole.document[np.argsort(-whole.length, kind="stable")]  # [n], less the documents of one token
    loader = PlanLoader(
        dataset.select(order),
        window=window,
        stride=stride,
        batch_size=batch_size,
        shuffle=False,
        with_others=any(name != SAMPLED and SELECTIONS[name].needs_others for name in selections),
        planner_sequence_per_window=model.planner_input is not None,
    )
    loader.share = (rank(), world_size())
    sums = _Sums(len(selections), len(dataset), is_warm=loader.num_batches == 1)
    was_training = model.training
    model.train(False)
    progress = Progress("evaluate", total=loader.num_batches * len(selections), unit="batches")
    with progress, torch.inference_mode(), autocast(precision, model.device):
        for batch in loader:
            numbers = torch.from_numpy(order)[batch.documents].where(batch.documents >= 0, -1)  # in the whole split
            batch = replace(batch, documents=numbers)
            width = min(window, few_sizes(int((batch.plan.segment_ids >= 0).sum(dim=1).max())))
            on_device = batch.to(model.device)
            sums.count(batch)
            for row, selection in enumerate(selections):
                begun = time.perf_counter()
                scored = _Scored(model, on_device, width)
                token_nll = scored.sampled(sampling) if selection == SAMPLED else scored.under(selection)
                sums.add(row, batch, token_nll.double(), begun)
                progress.advance()
            sums.is_warm = True
    model.train(was_training)
    return dict(zip(selections, sums.reduced(model.device), strict=True))


class _Scored:
    """A batch under one plan or another; scores are `[B, width]`, 0 where no token is scored."""

    def __init__(self, model: PlanLMForCausalLM, batch: PlanBatch, width: int) -> None:
        self._model, self._batch = model, batch
        self._ids, self._labels = batch.input_ids[:, :width], batch.labels[:, :width]
        self._plan = batch.plan.replaced(segment_ids=batch.plan.segment_ids[:, :width])

    def under(self, selection: str) -> Tensor:
        """NLL of each token under a selection."""
        token_nll = self._run(selection, self._plan).token_nll
        assert token_nll is not None
        return token_nll

    def sampled(self, sampling: Sampling) -> Tensor:
        """NLL of each token's probability, averaged over sampled plans."""
        logits = self._run("soft", self._plan).action_logits
        assert logits is not None
        upto = (logits.double() / self._model.config.plan_temperature).softmax(dim=-1).cumsum(dim=-1)  # [S, K]
        mean = torch.full(self._labels.shape, -torch.inf, dtype=torch.float64, device=upto.device)
        for draw in range(sampling.num_plans):
            drawn = uniform_by_sentence(self._batch, sampling.seed, draw)[:, None]
            actions = torch.searchsorted(upto, drawn, right=True).squeeze(1).clamp_max(upto.shape[1] - 1)
            token_nll = self._run("oracle", replace(self._plan, actions=actions)).token_nll
            assert token_nll is not None
            mean = torch.logaddexp(mean, -token_nll.double())
        return (math.log(sampling.num_plans) - mean).where(self._labels != IGNORED, 0.0)

    def _run(self, selection: str, plan: PlanInputs) -> PlanLMOutput:
        output: PlanLMOutput = self._model(
            self._ids,
            shift_labels=self._labels,
            plan=plan,
            selection=selection,
            use_cache=False,
        )
        return output


class _Sums:
    """What is added up over batches and processes, by row and document; `is_warm`: whether time counts yet.

    The first batch's does not where there are others: operators are compiled and memory is taken in it.
    """

    def __init__(self, num_rows: int, num_documents: int, *, is_warm: bool) -> None:
        cells = num_documents * len(POSITIONS)
        self._nll = torch.zeros(num_rows, num_documents, dtype=torch.float64)
        self._tokens = torch.zeros(num_documents, dtype=torch.int64)
        self._cell_nll = torch.zeros(num_rows, cells, dtype=torch.float64)
        self._cell_tokens = torch.zeros(cells, dtype=torch.int64)
        self._seconds = torch.zeros(num_rows, dtype=torch.float64)
        self._timed = torch.zeros(1, dtype=torch.float64)
        self.is_warm = is_warm

    def count(self, batch: PlanBatch) -> None:
        """The tokens of a batch."""
        self._documents = batch.documents[:, 0]  # [B]
        self._scored = batch.labels != IGNORED  # [B, W]
        self._tokens.index_add_(0, self._documents, self._scored.sum(dim=1))
        plan = batch.plan
        assert plan.sentence_positions is not None
        number = 1 + plan.sentence_positions[plan.segment_rows.unbind(1)]  # [S]
        bucket = torch.bucketize(number, torch.tensor(POSITION_EDGES), right=True)
        cells = self._documents[:, None] * len(POSITIONS) + bucket[plan.segment_ids]
        self._cells = cells[self._scored]
        self._cell_tokens.index_add_(0, self._cells, torch.ones_like(self._cells))
        self._timed += self.is_warm * len(self._cells)

    def add(self, row: int, batch: PlanBatch, token_nll: Tensor, begun: float) -> None:
        """The scores `[B, width]` of a row, whose computation began at a time of `perf_counter`."""
        self._nll[row].index_add_(0, self._documents, token_nll.sum(dim=1).cpu())
        self._seconds[row] += self.is_warm * (time.perf_counter() - begun)
        scored = self._scored[:, : token_nll.shape[1]]
        self._cell_nll[row].index_add_(0, self._cells, token_nll.cpu()[scored])

    def reduced(self, device: torch.device) -> Iterator[SplitScores]:
        """The scores of each row over all processes."""
        nll, tokens, cell_nll, cell_tokens, seconds, timed = (
            all_reduce(mine.to(device)).cpu().numpy()
            for mine in (self._nll, self._tokens, self._cell_nll, self._cell_tokens, self._seconds, self._timed)
        )
        shape = (len(tokens), len(POSITIONS))
        for row in range(len(nll)):
            per_thousand = 1000 * float(seconds[row]) / max(1.0, float(timed[0]))
            parts = cell_nll[row].reshape(shape), cell_tokens.reshape(shape)
            yield SplitScores(nll[row], tokens, *parts, per_thousand)
