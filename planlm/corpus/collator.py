"""Windows of a prepared corpus for other people's loops: a DataLoader's or transformers' Trainer's collate function."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch

from planlm.corpus.batches import IGNORED, PlanLoader


class PlanCollator:
    """Makes keyword arguments of the joint model from numbers of windows: `range(len(collator))` is the data set.

    Each window is a sequence of its own, W positions, padded; a document's tokens are labels once, as in `PlanLoader`.

    Args:
        dataset: a split of a prepared corpus.
        window: W, tokens per window.

    Raises:
        ValueError: a window without tokens.
    """

    def __init__(self, dataset: datasets.Dataset, *, window: int) -> None:
        self._loader = PlanLoader(dataset, window=window, batch_size=1, shuffle=False)

    def __len__(self) -> int:
        return len(self._loader.windows)

    def __call__(self, windows: list[int]) -> dict[str, Any]:
        """`input_ids`, `position_ids`, `labels`, `shift_labels` `[B, W]`, and the fields of `PlanInputs`.

        `labels` are for Trainer, which looks for them; the model scores `shift_labels`, which have the token behind
        the window too.
        """
        batch = self._loader.collate(np.array(windows))
        labels = torch.nn.functional.pad(batch.labels[:, :-1], (1, 0), value=IGNORED)
        plan = {name: value for name, value in vars(batch.plan).items() if value is not None}
        return {"input_ids": batch.input_ids, **batch.layout, "labels": labels, "shift_labels": batch.labels, **plan}
