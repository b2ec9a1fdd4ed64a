"""From a split of a prepared corpus to batches: what the model sees of a corpus.

B windows, W positions, D documents, n sentences at most, S segments (sentences as far as a window shows them), A dims.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import datasets
import numpy as np
import pyarrow.compute
import torch
from torch import Tensor

from planlm.corpus.mapped import MappedFiles
from planlm.corpus.packing import fill, packs

IGNORED = -100
"""Label of a position that is not scored, as in torch's and transformers' cross-entropies."""

RELEASED_AFTER = 1024
"""Documents read between releases of the mapped files: for each the system maps some 64 KiB of every column."""

Batch = TypeVar("Batch", "PlanBatch", "SentenceBatch")


@dataclass(frozen=True)
class PlanBatch:
    """Windows of documents with what their plans are made from.

    A row holds one window or, packed, several behind each other. The plan at position t is that of the sentence which
    holds token t+1, also where that token is beyond the window.

    Attributes:
        input_ids: [B, W] int64, padded with 0 on the right.
        position_ids: [B, W] int64, from 0 in every window. Where one begins within a row, transformers' attention sees
            a new sequence that does not attend to what stands before it.
        labels: [B, W] int64, already shifted: the token after each input; -100 is not scored.
        segment_ids: [B, W] int64, index into the segments; -1 on padding; sorted over the batch, padding aside.
        segment_rows: [S, 2] int64, row of the document in `sentence_embeddings` and number of the sentence in it.
        actions: [S] int64, the oracle action of the sentence.
        sentence_embeddings: [D, n, A] float32, zero-padded, each document once; it ends before the last sentence
            that a segment needs (n may be 0), since a plan is made from the sentences before.
        documents: [B, W] int64, number of the document in the split, -1 on padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    segment_ids: Tensor
    segment_rows: Tensor
    actions: Tensor
    sentence_embeddings: Tensor
    documents: Tensor

    def to(self, device: torch.device | str) -> PlanBatch:
        """The same batch on `device`."""
        return _to(self, device)

    def unscored(self) -> PlanBatch:
        """The same batch, of which nothing counts."""
        return dataclasses.replace(
            self, labels=torch.full_like(self.labels, IGNORED), actions=torch.full_like(self.actions, -1)
        )


@dataclass(frozen=True)
class SentenceBatch:
    """Whole documents for the planner.

    Attributes:
        sentence_embeddings: [D, n, A] float32, zero-padded.
        actions: [D, n] int64, -100 on padding.
    """

    sentence_embeddings: Tensor
    actions: Tensor

    def to(self, device: torch.device | str) -> SentenceBatch:
        """The same batch on `device`."""
        return _to(self, device)

    def unscored(self) -> SentenceBatch:
        """The same batch, of which nothing counts."""
        return dataclasses.replace(self, actions=torch.full_like(self.actions, IGNORED))


@dataclass(frozen=True)
class WindowIndex:
    """Windows of a split, in the order of its documents; arrays of one entry a window.

    Attributes:
        document: number of the document in the split.
        start: first input token.
        length: inputs, and labels: those are the tokens from start + 1 to start + length.
        unscored: so many labels at the beginning belong to the window before.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    unscored: np.ndarray

    def __len__(self) -> int:
        return len(self.document)


def windows(dataset: datasets.Dataset, window: int, stride: int | None = None) -> WindowIndex:
    """Cut every document into windows so that each of its tokens but the first is scored exactly once.

    Windows never reach across documents; a document of one token has none. With `stride` < `window` this is the
    sliding window of transformers' perplexity page: later windows score only what the one before did not reach.

    Args:
        dataset: a split with the column `input_ids`.
        window: inputs per window, at least 1.
        stride: tokens from window to window, at most `window`; default: `window`.
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride: expected 1 to window ({window}), got {stride}")
    labels = _lengths(dataset, "input_ids") - 1
    counts = np.where(labels < 1, 0, 1 + np.maximum(0, -(-(labels - window) // stride)))
    document = np.repeat(np.arange(len(labels)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * stride
    return WindowIndex(
        document=document,
        start=start,
        length=np.minimum(window, labels[document] - start),
        unscored=np.where(number > 0, window - stride, 0),
    )


class _Loader(ABC, Generic[Batch]):
    """One epoch of batches per iteration, in an order that seed and epoch decide, with a position that can be stored.

    An iteration that was left early goes on where it stopped. Several processes share each batch: order and position
    do not depend on how many there are, and each reads its own items only.

    Attributes:
        epoch: decides the order; set it between iterations.
        share: (number of this process, how many share a batch). A process without an item gets one that counts nothing.
    """

    share = (0, 1)

    def __init__(self, num_items: int, batch_size: int, seed: int, shuffle: bool) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self._num_items, self._batch_size = num_items, batch_size
        self._seed, self._shuffle = seed, shuffle
        self.epoch = 0
        self._next = 0

    @property
    def num_batches(self) -> int:
        """Batches of one epoch."""
        return -(-self._num_items // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = np.arange(self._num_items)
        if self._shuffle:
            order = self._order(np.random.default_rng([self._seed, self.epoch]))
        while self._next < self.num_batches:
            items = order[self._next * self._batch_size : (self._next + 1) * self._batch_size]
            # Counted before the batch is handed out: a state stored after its step must not repeat it.
            self._next += 1
            own = items[self.share[0] :: self.share[1]]
            yield self._collate(own) if len(own) else self._collate(items[:1]).unscored()
        self._next = 0

    def _order(self, random: np.random.Generator) -> np.ndarray:
        """Items of an epoch in the order of their batches."""
        return random.permutation(self._num_items)

    def state_dict(self) -> dict[str, Any]:
        """Position: the epoch and the number of the batch that comes next."""
        return {"epoch": self.epoch, "batch": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position that `state_dict` gave."""
        self.epoch, self._next = state["epoch"], state["batch"]

    @abstractmethod
    def _collate(self, items: np.ndarray) -> Batch:
        """The batch of these items."""


class PlanLoader(_Loader[PlanBatch]):
    """Batches of windows for training and evaluation.

    Args:
        dataset: a split of a prepared corpus.
        window: W, inputs per row.
        batch_size: B, rows per batch; the last batch may have fewer.
        seed: of the order.
        shuffle: rows in random order, new in every epoch, or in that of the documents.
        stride: see `windows`.
        pack: put several short windows into one row, other ones in every epoch; needs `shuffle`.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        window: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        stride: int | None = None,
        pack: bool = False,
    ) -> None:
        if pack and not shuffle:
            raise ValueError("pack: expected shuffle=True, as every epoch draws which windows share a row")
        self.windows = windows(dataset, window, stride)
        self._packs = packs(self.windows.length, window) if pack else None
        num_rows = len(self.windows) if self._packs is None else sum(count for count, _ in self._packs)
        super().__init__(num_rows, batch_size, seed, shuffle)
        self._documents = _Documents(dataset, ("input_ids", "sentence_tokens", "actions", "embeddings"))
        self._window = window
        self._members = np.arange(num_rows)  # windows, row after row
        self._first = np.arange(num_rows + 1)  # of each row in `_members`

    def _order(self, random: np.random.Generator) -> np.ndarray:
        if self._packs is not None:
            self._members, self._first = fill(self._packs, self.windows.length, random)
        return super()._order(random)

    def _collate(self, items: np.ndarray) -> PlanBatch:
        members = [self._members[self._first[row] : self._first[row + 1]] for row in items]
        unique, rows = np.unique(self.windows.document[np.concatenate(members)], return_inverse=True)
        row_of = iter(rows.tolist())
        contents = [self._documents[int(document)] for document in unique]
        ends = [np.cumsum(content["sentence_tokens"]) for content in contents]
        input_ids = np.zeros((len(items), self._window), dtype=np.int64)  # [B, W]
        position_ids = np.tile(np.arange(self._window), (len(items), 1))
        labels = np.full_like(input_ids, IGNORED)
        segment_ids, documents = np.full_like(input_ids, -1), np.full_like(input_ids, -1)
        segments: list[np.ndarray] = []  # one [s, 2] a window: row of the document, number of the sentence
        num_segments = 0
        for at, packed in enumerate(members):
            begin = 0
            for item in packed:
                row = next(row_of)
                start, length = self.windows.start[item], self.windows.length[item]
                end = begin + length
                tokens = contents[row]["input_ids"][start : start + length + 1]
                input_ids[at, begin:end] = tokens[:-1]
                position_ids[at, begin:] -= position_ids[at, begin]
                scored = self.windows.unscored[item]
                labels[at, begin + scored : end] = tokens[1 + scored :]
                documents[at, begin:end] = unique[row]
                # Position t shows token start + t and predicts the one after it, whose sentence is the one that counts.
                sentences = np.searchsorted(ends[row], np.arange(start + 1, start + length + 1), side="right")
                shown, within = np.unique(sentences, return_inverse=True)
                segment_ids[at, begin:end] = num_segments + within
                segments.append(np.stack([np.full_like(shown, row), shown], axis=1))
                num_segments += len(shown)
                begin = end
        segment_rows = np.concatenate(segments)  # [S, 2]
        needed = np.zeros(len(unique), dtype=np.int64)
        np.maximum.at(needed, segment_rows[:, 0], segment_rows[:, 1])
        actions = [contents[row]["actions"][number] for row, number in segment_rows]
        return PlanBatch(
            input_ids=torch.from_numpy(input_ids),
            position_ids=torch.from_numpy(position_ids),
            labels=torch.from_numpy(labels),
            segment_ids=torch.from_numpy(segment_ids),
            segment_rows=torch.from_numpy(segment_rows),
            actions=torch.tensor(np.array(actions, dtype=np.int64)),
            sentence_embeddings=_padded([content["embeddings"] for content in contents], needed),
            documents=torch.from_numpy(documents),
        )


class SentenceLoader(_Loader[SentenceBatch]):
    """Batches of whole documents for the planner.

    Args:
        dataset: a split of a prepared corpus.
        batch_size: documents per batch; the last batch may have fewer.
        seed: of the order.
        shuffle: documents in random order, new in every epoch, those of like length together; or in that of the split.
    """

    def __init__(self, dataset: datasets.Dataset, *, batch_size: int, seed: int = 0, shuffle: bool = True) -> None:
        super().__init__(len(dataset), batch_size, seed, shuffle)
        self._documents = _Documents(dataset, ("actions", "embeddings"))
        self._lengths = _lengths(dataset, "actions")

    def _order(self, random: np.random.Generator) -> np.ndarray:
        # One article of 400 sentences in a batch of 30-sentence ones is 12 parts of padding to one of text: a random
        # pool of batches is sorted by length, then its batches are shuffled.
        order = random.permutation(self._num_items)
        pool = 32 * self._batch_size
        batches: list[np.ndarray] = []
        for start in range(0, self._num_items, pool):
            part = order[start : start + pool]
            part = part[np.argsort(-self._lengths[part], kind="stable")]
            batches += np.split(part, range(self._batch_size, len(part), self._batch_size))
        last = batches.pop()  # may be short, and then must stay the last
        return np.concatenate([*(batches[at] for at in random.permutation(len(batches))), last])

    def _collate(self, items: np.ndarray) -> SentenceBatch:
        contents = [self._documents[int(document)] for document in items]
        lengths = np.array([len(content["actions"]) for content in contents])
        actions = np.full((len(items), lengths.max()), IGNORED, dtype=np.int64)  # [D, n]
        for row, content in enumerate(contents):
            actions[row, : lengths[row]] = content["actions"]
        return SentenceBatch(
            sentence_embeddings=_padded([content["embeddings"] for content in contents], lengths),
            actions=torch.from_numpy(actions),
        )


class _Documents:
    """Columns of single documents as arrays that point into the memory-mapped files."""

    def __init__(self, dataset: datasets.Dataset, columns: tuple[str, ...]) -> None:
        self._rows = dataset.with_format("arrow", columns=list(columns))
        self._files = MappedFiles(file["filename"] for file in dataset.cache_files)
        self._read = 0

    def __getitem__(self, document: int) -> dict[str, np.ndarray]:
        self._read += 1
        if self._read % RELEASED_AFTER == 0:
            self._files.release()
        table = self._rows[document]
        return {name: _array(table[name].chunk(0)) for name in table.column_names}


def _array(column: Any) -> np.ndarray:
    """The one list in an Arrow column, as an array without a copy; a list of fixed-size lists gets two dimensions."""
    values = column.flatten()
    if hasattr(values.type, "list_size"):
        return values.flatten().to_numpy().reshape(len(values), values.type.list_size)
    return values.to_numpy()


def _lengths(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """Lengths of the lists in a column, int64, without reading the lists."""
    rows = dataset.with_format("arrow", columns=[column])
    lengths = [pyarrow.compute.list_value_length(table[column]).to_numpy() for table in rows.iter(1000)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *lengths])


def _padded(embeddings: list[np.ndarray], lengths: np.ndarray) -> Tensor:
    """The first `lengths[i]` rows of each array, zero-padded to one float32 tensor [D, max length, A]."""
    padded = np.zeros((len(embeddings), int(lengths.max()), embeddings[0].shape[1]), dtype=np.float32)
    for row, (rows, length) in enumerate(zip(embeddings, lengths, strict=True)):
        padded[row, :length] = rows[:length]
    return torch.from_numpy(padded)


def _to(batch: Any, device: torch.device | str) -> Any:
    """A dataclass of tensors on `device`."""
    moved = {field.name: getattr(batch, field.name).to(device) for field in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **moved)
