"""From a split of a prepared corpus to batches: what the model sees of a corpus.

B sequences of W positions for the LM, R sequences of n positions for the planner, D documents, S segments (sentences as
far as a window shows them), A dimensions of an embedding.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import datasets
import numpy as np
import pyarrow.compute
import torch
from torch import Tensor

from planlm.corpus.layout import Layout
from planlm.corpus.mapped import MappedFiles
from planlm.corpus.offsets import ALIKE, document_offsets, few_sizes, segment_bounds
from planlm.corpus.packing import fill, packs
from planlm.corpus.writing import joined
from planlm.errors import InputError
from planlm.plan_inputs import Movable, PlanInputs

IGNORED = -100
"""Label of a position that is not scored, as in torch's and transformers' cross-entropies."""

RELEASED_AFTER = 64
"""Documents read between releases of the mapped files: for each the system maps some 64 KiB of every column."""

Batch = TypeVar("Batch", "PlanBatch", "SentenceBatch")


@dataclass(frozen=True)
class PlanBatch(Movable):
    """Windows of documents with what their plans are made from.

    A sequence holds one window or, packed, several behind each other. The plan at position t is that of the sentence
    which holds token t+1, also where that token is beyond the window.

    Attributes:
        input_ids: [B, W] int64, padded with 0 on the right.
        position_ids: [B, W] int64, from 0 in every window. Where one begins within a sequence, transformers' attention
            sees a new one that does not attend to what stands before it.
        labels: [B, W] int64, already shifted: the token after each input; -100 is not scored.
        plan: what the model plans from; each document once (or for each window), as far as a segment needs it.
            Segments at the end that no position has bring S to one of few sizes; they have no action.
        documents: [B, W] int64, number of the document in the split, -1 on padding.
        cu_seqlens: [N + 1] int32, where in all B W positions windows begin, padding counted to the one before it, as
            `position_ids` have it, and the end; see `corpus.offsets.document_offsets`.
        longest: so many positions a window has at most.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    plan: PlanInputs
    documents: Tensor
    cu_seqlens: Tensor | None = None
    longest: int = 0

    @property
    def layout(self) -> dict[str, Any]:
        """How the sequences are divided into windows, as keyword arguments of the model."""
        return {"position_ids": self.position_ids, "cu_seqlens": self.cu_seqlens, "longest": self.longest}

    @property
    def actions(self) -> Tensor:
        """Oracle actions of the segments, [S]; -1 for those that no position has."""
        assert self.plan.actions is not None
        return self.plan.actions

    def sentences(self) -> tuple[Tensor, Tensor]:
        """([S] number of each segment's document in the split, 0 where no position has it; [S] of its sentence)."""
        assert self.plan.sentence_positions is not None
        count, ids = len(self.actions), self.plan.segment_ids.flatten()
        # One place more takes what belongs to no segment; picking by a mask would wait for the device.
        document = self.actions.new_zeros(count + 1).scatter(0, ids.where(ids >= 0, count), self.documents.flatten())
        return document[:count], self.plan.sentence_positions[self.plan.segment_rows.unbind(1)]

    def unscored(self) -> PlanBatch:
        """The same batch, of which nothing counts."""
        ahead = self.plan.actions_ahead
        plan = dataclasses.replace(
            self.plan,
            actions=torch.full_like(self.actions, -1),
            actions_ahead=None if ahead is None else torch.full_like(ahead, -1),
        )
        return dataclasses.replace(self, labels=torch.full_like(self.labels, IGNORED), plan=plan)


@dataclass(frozen=True)
class SentenceBatch(Movable):
    """Whole documents for the planner.

    Attributes:
        sentence_embeddings: [R, n, A] float32, at each position the embedding of the sentence before, 0 where there
            is none.
        sentence_positions: [R, n] int64, number of the sentence in its document; 0 on padding.
        actions: [R, n] int64, of the sentences; -100 on padding.
        labelled: [S] int64, where in all sequences, one behind the other, the sentences stand.
        own_embeddings: [R, n, A] float32, at each position the sentence's own embedding, if asked for.
        cu_seqlens: [N + 1] int32, where in all R n positions documents begin, and padding, and the end.
        longest: so many positions a document has at most.
    """

    sentence_embeddings: Tensor
    sentence_positions: Tensor
    actions: Tensor
    labelled: Tensor
    own_embeddings: Tensor | None = None
    cu_seqlens: Tensor | None = None
    longest: int = 0

    @property
    def planner_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the planner."""
        names = ("sentence_embeddings", "sentence_positions", "cu_seqlens", "longest")
        return {name: getattr(self, name) for name in names}

    def ahead(self, step: int) -> Tensor:
        """[R, n] int64, where in all sequences, one behind the other, the sentence `step` later stands, -1 for none."""
        at = torch.arange(self.actions.numel(), device=self.actions.device).view(self.actions.shape) + step
        later = self.sentence_positions.flatten()[at.clamp(max=at.numel() - 1)]
        is_there = (at < at.numel()) & (later == self.sentence_positions + step)
        return at.where(is_there, -1)

    def unscored(self) -> SentenceBatch:
        """The same batch, of which nothing counts."""
        return dataclasses.replace(self, actions=torch.full_like(self.actions, IGNORED), labelled=self.labelled[:0])


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


def partners(dataset: datasets.Dataset) -> np.ndarray:
    """For each document the number of another one, `[D]`, which has as many sentences or nearly so.

    In order of their numbers of sentences, ties by id, every two neighbours are each other's; the last of an odd number
    has the one before it. Nothing is drawn, and no batch matters.

    Raises:
        InputError: there is one document only.
    """
    order = np.lexsort((np.array(dataset["id"][:]), _lengths(dataset, "actions")))
    if len(order) < 2:
        raise InputError("selection shuffled: a plan is another document's, and there is one document; take more")
    neighbour = np.arange(len(order)) ^ 1
    neighbour[-1] = np.minimum(neighbour[-1], len(order) - 2) if len(order) % 2 else neighbour[-1]
    found = np.empty_like(order)
    found[order] = order[neighbour]
    return found


class _Loader(ABC, Generic[Batch]):
    """One epoch of batches per iteration, in an order that seed and epoch decide, with a position that can be stored.

    An iteration that was left early goes on where it stopped. Several processes share each batch: order and position
    do not depend on how many there are, and each reads its own items only.

    Attributes:
        epoch: decides the order; set it between iterations.
        share: (rank, world size). A rank for which a batch has no item gets one of which nothing is scored.
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
    def num_items(self) -> int:
        """Sequences, or documents, of one epoch."""
        return self._num_items

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
            yield self.collate(own) if len(own) else self.collate(items[:1]).unscored()
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
    def collate(self, items: np.ndarray) -> Batch:
        """The batch of these items."""


class PlanLoader(_Loader[PlanBatch]):
    """Batches of windows for training and evaluation.

    Args:
        dataset: a split of a prepared corpus.
        window: W, inputs per sequence.
        batch_size: B, sequences per batch; the last batch may have fewer.
        seed: of the order.
        shuffle: sequences in random order, new in every epoch, or in that of the documents.
        stride: see `windows`.
        pack: put several short windows into one sequence, other ones in every epoch; needs `shuffle`.
        with_others: give `PlanInputs.shuffled_rows` too, see `partners`.
        planner_sequence_per_window: give the planner a document once for each of its windows in a batch, and not once
            for all: what it reads of a sentence may depend on the window.

    Attributes:
        horizon: next actions given for each segment, set as `share` is.
        alike: nearly all batches have one shape, at the cost of more padding for the planner; set as `share` is.
    """

    horizon = 1
    alike = False

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
        with_others: bool = False,
        planner_sequence_per_window: bool = False,
    ) -> None:
        if pack and not shuffle:
            raise ValueError("pack: expected shuffle=True, as every epoch draws which windows share a sequence")
        if with_others and planner_sequence_per_window:
            raise ValueError(
                "with_others: another document is shown by no window; leave out planner_sequence_per_window"
            )
        self.windows = windows(dataset, window, stride)
        self._packs = packs(self.windows.length, window) if pack else None
        num_sequences = len(self.windows) if self._packs is None else sum(count for count, _ in self._packs)
        super().__init__(num_sequences, batch_size, seed, shuffle)
        self._documents = _Documents(dataset, ("input_ids", "sentence_tokens", "actions", "embeddings"))
        self._dataset = dataset
        self._window, self._per_window = window, planner_sequence_per_window
        self._partners = partners(dataset) if with_others else None
        self._members = np.arange(num_sequences)  # windows, sequence after sequence
        self._first = np.arange(num_sequences + 1)  # of each sequence in `_members`

    @cached_property
    def _most_sentences(self) -> int:
        """Of a document of the split; asked for where batches are alike."""
        return int(_lengths(self._dataset, "sentence_tokens").max(initial=1))

    @property
    def _of_octave(self) -> int:
        return ALIKE if self.alike else 8

    def _order(self, random: np.random.Generator) -> np.ndarray:
        if self._packs is not None:
            self._members, self._first = fill(self._packs, self.windows.length, random)
        return super()._order(random)

    def collate(self, items: np.ndarray) -> PlanBatch:
        """The batch of these sequences: windows by their numbers in `windows`, unless they are packed."""
        members = [self._members[self._first[item] : self._first[item + 1]] for item in items]
        shown = self.windows.document[np.concatenate(members)]
        if self._per_window:
            unique, numbers = shown, np.arange(len(shown))
        else:
            unique = np.unique(shown) if self._partners is None else np.union1d(shown, self._partners[shown])
            numbers = np.searchsorted(unique, shown)
        document_of = iter(numbers.tolist())
        contents = [self._documents[int(document)] for document in unique]
        ends = [np.cumsum(content["sentence_tokens"]) for content in contents]
        input_ids = np.zeros((len(items), self._window), dtype=np.int64)  # [B, W]
        position_ids = np.tile(np.arange(self._window), (len(items), 1))
        labels = np.full_like(input_ids, IGNORED)
        segment_ids, documents = np.full_like(input_ids, -1), np.full_like(input_ids, -1)
        segments: list[np.ndarray] = []  # one [s, 2] a window: number of the document, of the sentence
        num_segments = most_segments = 0
        for at, packed in enumerate(members):
            begin, before = 0, num_segments
            for window in packed:
                own = next(document_of)
                start, length = self.windows.start[window], self.windows.length[window]
                end = begin + length
                tokens = contents[own]["input_ids"][start : start + length + 1]
                input_ids[at, begin:end] = tokens[:-1]
                position_ids[at, begin:] -= position_ids[at, begin]
                scored = begin + self.windows.unscored[window]
                labels[at, scored:end] = tokens[1 + scored - begin :]
                documents[at, begin:end] = unique[own]
                # Position t shows token start + t and predicts the one after it, whose sentence is the one that counts.
                sentences = np.searchsorted(ends[own], np.arange(start + 1, start + length + 1), side="right")
                shown, within = np.unique(sentences, return_inverse=True)
                segment_ids[at, begin:end] = num_segments + within
                segments.append(np.stack([np.full_like(shown, own), shown], axis=1))
                num_segments += len(shown)
                begin = end
            most_segments = max(most_segments, num_segments - before)
        plan = self._plan_inputs(segment_ids, np.concatenate(segments), unique, contents)
        cu_seqlens, longest = document_offsets(position_ids == 0, self._of_octave)
        return PlanBatch(
            input_ids=torch.from_numpy(input_ids),
            position_ids=torch.from_numpy(position_ids),
            labels=torch.from_numpy(labels),
            plan=dataclasses.replace(plan, most_segments=few_sizes(most_segments, self._of_octave)),
            documents=torch.from_numpy(documents),
            cu_seqlens=cu_seqlens,
            longest=longest,
        )

    def _plan_inputs(
        self, segment_ids: np.ndarray, segments: np.ndarray, unique: np.ndarray, contents: list[dict[str, np.ndarray]]
    ) -> PlanInputs:
        """Plan inputs of segments `[s, 2]`, document (as its place in `unique` and `contents`) and sentence of each."""
        rows = [segments.T]
        if self._partners is not None:
            document, number = segments.T
            other = np.searchsorted(unique, self._partners[unique[document]])
            last = np.array([len(content["actions"]) - 1 for content in contents])
            rows.append(np.stack((other, np.minimum(number, last[other]))))
        needed = np.zeros(len(unique), dtype=np.int64)
        for document, number in rows:
            np.maximum.at(needed, document, number + 1)
        layout = Layout(needed, self._most_sentences if self.alike else 0)
        placed = np.zeros((len(rows), few_sizes(len(segments), self._of_octave), 2), dtype=np.int64)
        for at, (document, number) in enumerate(rows):
            places = np.divmod(layout.begins[document] + number, layout.shape[1])
            placed[at, : len(segments)] = np.stack(places, axis=1)
        actions = np.full(placed.shape[1], -1)
        actions[: len(segments)] = [contents[own]["actions"][number] for own, number in segments]
        ahead = np.full((len(actions), self.horizon - 1), -1)
        for row, (own, number) in zip(ahead, segments, strict=False):
            following = contents[own]["actions"][number + 1 : number + self.horizon]
            row[: len(following)] = following
        cu_seqlens, longest = layout.offsets()
        return PlanInputs(
            segment_ids=torch.from_numpy(segment_ids),
            segment_rows=torch.from_numpy(placed[0]),
            sentence_embeddings=layout.embeddings([content["embeddings"] for content in contents]),
            sentence_positions=layout.positions(),
            actions=torch.from_numpy(actions),
            actions_ahead=torch.from_numpy(ahead) if self.horizon > 1 else None,
            shuffled_rows=None if self._partners is None else torch.from_numpy(placed[1]),
            segment_bounds=segment_bounds(segment_ids, len(actions)),
            sentence_cu_seqlens=cu_seqlens,
            sentence_longest=longest,
        )


class SentenceLoader(_Loader[SentenceBatch]):
    """Batches of whole documents for the planner.

    Args:
        dataset: a split of a prepared corpus.
        batch_size: documents per batch; the last batch may have fewer.
        seed: of the order.
        shuffle: documents in random order, new in every epoch, or in that of the split.
        own_embeddings: give each sentence's own embedding too.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        own_embeddings: bool = False,
    ) -> None:
        super().__init__(len(dataset), batch_size, seed, shuffle)
        self._documents = _Documents(dataset, ("actions", "embeddings"))
        self._own_embeddings = own_embeddings

    def collate(self, items: np.ndarray) -> SentenceBatch:
        """The batch of these documents, by their numbers in the split."""
        contents = [self._documents[int(document)] for document in items]
        layout = Layout(np.array([len(content["actions"]) for content in contents]))
        cu_seqlens, longest = layout.offsets()
        actions = layout.actions([content["actions"] for content in contents], IGNORED)
        return SentenceBatch(
            sentence_embeddings=layout.embeddings([content["embeddings"] for content in contents]),
            sentence_positions=layout.positions(),
            actions=actions,
            labelled=(actions.flatten() != IGNORED).nonzero()[:, 0],
            own_embeddings=layout.own([content["embeddings"] for content in contents])
            if self._own_embeddings
            else None,
            cu_seqlens=cu_seqlens,
            longest=longest,
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
        return {name: joined(table[name]) for name in table.column_names}


def _lengths(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """Lengths of the lists in a column, int64, without reading the lists."""
    rows = dataset.with_format("arrow", columns=[column])
    lengths = [pyarrow.compute.list_value_length(table[column]).to_numpy() for table in rows.iter(1000)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *lengths])
