"""Offsets of a batch against loops over its positions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from planlm.corpus.batches import IGNORED, PlanLoader, SentenceLoader
from planlm.corpus.offsets import ALIKE, document_offsets, few_sizes, segment_bounds
from planlm.plan_inputs import PlanInputs
from tests.corpus.test_batches import dataset, random_dataset


def random_segments(generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """Sorted ids `[B, W]` with -1 anywhere among them, some ids that no position has, and the number of segments."""
    rows, width = int(generator.integers(1, 5)), int(generator.integers(1, 20))
    count = int(generator.integers(1, 12))
    ids = np.sort(generator.integers(0, count, rows * width))
    return np.where(generator.random(rows * width) < 0.3, -1, ids).reshape(rows, width), count + 2


def test_positions_of_a_segment_lie_within_its_bounds() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        ids, count = random_segments(generator)
        bounds = segment_bounds(ids, count)
        assert bounds.shape == (count + 1,) and str(bounds.dtype) == "torch.int32"
        ends = bounds.tolist()
        assert ends == sorted(ends) and ends[0] >= 0 and ends[-1] <= ids.size
        for segment in range(count):
            own = [at for at, found in enumerate(ids.reshape(-1).tolist()) if found == segment]
            inside = ids.reshape(-1)[ends[segment] : ends[segment + 1]].tolist()
            assert inside.count(segment) == len(own) and set(inside) <= {segment, -1}
            assert own or not inside, "a segment without positions has an empty range"


@pytest.mark.parametrize(
    ("ids", "bounds"),
    [
        ([[-1, 0, 0], [-1, -1, 2]], [0, 5, 5, 6, 6]),  # row after row; nobody has 1 or 3
        ([[0, 1, -1, -1]], [0, 1, 2, 2, 2]),  # what stands behind the last segment is not its own
        ([[-1, -1]], [0, 0, 0, 0, 0]),
    ],
)
def test_bounds_of_small_batches(ids: list[list[int]], bounds: list[int]) -> None:
    found = segment_bounds(np.array(ids), 4).tolist()
    assert found[1:] == bounds[1:] and found[0] <= bounds[1]


def test_other_segments_have_other_bounds() -> None:
    ids = torch.tensor([[0, 0, 1]])
    plan = PlanInputs(ids, torch.zeros(2, 2), torch.zeros(1, 2, 4), segment_bounds=segment_bounds(ids.numpy(), 2))
    assert plan.replaced(oracle_weight=1.0).segment_bounds is plan.segment_bounds
    assert plan.replaced(segment_ids=ids[:, :2]).segment_bounds is None


def parts(offsets: torch.Tensor, longest: int, rows: int, width: int) -> list[tuple[int, int]]:
    """(first position, length) of each document, after what holds for all offsets."""
    ends = offsets.tolist()
    assert offsets.dtype == torch.int32 and ends[0] == 0 and ends[-1] == rows * width and ends == sorted(ends)
    found = [(begin, end - begin) for begin, end in itertools.pairwise(ends) if end > begin]
    assert len(ends) - 1 == (rows if len(found) == rows else few_sizes(len(found)))
    assert all(begin // width == (begin + length - 1) // width for begin, length in found), "none reaches over a row"
    most = max(length for _, length in found)
    assert most <= longest <= min(width, 2 * most) and longest in {1 << power for power in range(20)} | {width}
    return found


def begun(numbers: list[list[int]]) -> list[tuple[int, int]]:
    """Documents by their positions' numbers: one begins with a row, and where numbers do not go on by one."""
    found: list[tuple[int, int]] = []
    for row, own in enumerate(numbers):
        for at, number in enumerate(own):
            if at and number == own[at - 1] + 1:
                found[-1] = (found[-1][0], found[-1][1] + 1)
            else:
                found.append((row * len(own) + at, 1))
    return found


@pytest.mark.parametrize("window", [1, 2, 16, 100, 500])
@pytest.mark.parametrize("pack", [False, True])
def test_offsets_of_windows_are_those_of_their_positions(window: int, pack: bool) -> None:
    """Many packings: windows of one token, several in a sequence, sequences that end in padding."""
    seen = set()
    for seed in range(3):
        for batch in PlanLoader(
            random_dataset(), window=window, batch_size=5 if window > 2 else 120, seed=seed, pack=pack
        ):
            rows, width = batch.input_ids.shape
            found = parts(batch.cu_seqlens, batch.longest, rows, width)
            assert found == begun(batch.position_ids.tolist())
            assert pack or (
                len(batch.cu_seqlens) == rows + 1 and found == [(row * width, width) for row in range(rows)]
            )
            seen.add((len(found) > rows, bool((batch.documents == -1).any()), any(size == 1 for _, size in found)))
    assert not pack or window < 16 or {(True, True, True)} & seen, "there were several windows, padding, one-token ones"


def test_offsets_of_the_planner_s_documents() -> None:
    """Each document, and padding behind the last of a sequence as one more."""
    counts = np.random.default_rng(3).integers(1, 20, 60).tolist()
    rows = dataset([[2] * count for count in [*counts, 1, 1]])
    for batch in SentenceLoader(rows, batch_size=11):
        shape = batch.actions.shape
        numbers = batch.sentence_positions.tolist()
        for own, actions in zip(numbers, batch.actions.tolist(), strict=True):
            count = len(actions) - actions.count(IGNORED)
            own[count:] = range(-100, len(own) - count - 100)  # as one document that nobody has
        assert parts(batch.cu_seqlens, batch.longest, *shape) == begun(numbers)
    for batch in PlanLoader(rows, window=10, batch_size=7, pack=True):
        found = dict(
            parts(batch.plan.sentence_cu_seqlens, batch.plan.sentence_longest, *batch.plan.sentence_positions.shape)
        )
        numbers = batch.plan.sentence_positions
        for row, place in batch.plan.segment_rows.tolist():
            begin = row * numbers.shape[1] + place - int(numbers[row, place])
            assert found[begin] > int(numbers[row, place]), "a sentence stands in its document"


@pytest.mark.parametrize("window", [2, 16, 100])
def test_alike_batches_are_of_fewer_shapes_and_say_the_same(window: int) -> None:
    """Sentence by sentence: what a segment reads, its action, and where its document's sentences stand.

    What depends on the text is a power of two.
    """
    made = {}
    for alike in (False, True):
        loader = PlanLoader(random_dataset(), window=window, batch_size=5 if window > 2 else 120, seed=1, pack=True)
        loader.alike = alike
        made[alike] = list(loader)
    shapes = {False: set(), True: set()}
    most = few_sizes(max(len(actions) for actions in random_dataset()["actions"]), ALIKE)
    for plain, other in zip(made[False], made[True], strict=True):
        for alike, batch in ((False, plain), (True, other)):
            shapes[alike].add((*(tensor.shape for tensor in batch.tensors()), batch.plan.sentence_longest))
        for name in ("input_ids", "position_ids", "labels", "documents"):
            assert torch.equal(getattr(plain, name), getattr(other, name))
        assert torch.equal(plain.plan.segment_ids, other.plan.segment_ids)
        count = int(plain.plan.segment_ids.max()) + 1
        assert torch.equal(plain.actions[:count], other.actions[:count])
        assert bool((other.actions[count:] == -1).all())
        assert torch.equal(plain.plan.segment_bounds[: count + 1], other.plan.segment_bounds[: count + 1])
        for name in ("sentence_embeddings", "sentence_positions"):
            read, also = (getattr(one, name)[one.segment_rows[:count].unbind(1)] for one in (plain.plan, other.plan))
            assert torch.equal(read, also)
        assert other.plan.sentence_positions.shape[0] == 1
        documents = len(other.cu_seqlens) - 1
        for size in (len(other.actions), other.plan.sentence_positions.shape[1], documents):
            assert size & (size - 1) == 0 or (size == documents == len(other.input_ids))
        ends = other.plan.sentence_cu_seqlens.tolist()
        assert ends[0] == 0 and ends[-1] == other.plan.sentence_positions.numel() and ends == sorted(ends)
        for place in other.plan.segment_rows[:count, 1].tolist():
            assert place - int(other.plan.sentence_positions[0, place]) in ends
        # A kernel launches blocks for the longest of each, whether they have work or not, and padding is work.
        assert other.plan.sentence_longest == min(ends[-1], most)
        assert max(end - begin for begin, end in itertools.pairwise(ends)) <= most
    assert len(shapes[True]) <= len(shapes[False]) * 3 / 4


def test_sizes_of_offsets_are_few() -> None:
    generator = np.random.default_rng(0)
    made = [document_offsets(generator.random((8, 64)) < 0.3) for _ in range(200)]
    assert len({len(offsets) for offsets, _ in made}) <= 6 and len({longest for _, longest in made}) <= 4


def test_other_sentences_have_other_offsets() -> None:
    (batch,) = SentenceLoader(dataset([[1, 1], [1]]), batch_size=2)
    plan = PlanInputs(
        torch.zeros(1, 2), torch.zeros(2, 2), batch.sentence_embeddings, sentence_cu_seqlens=batch.cu_seqlens
    )
    assert plan.replaced(want_oracle_nll=True).sentence_cu_seqlens is batch.cu_seqlens
    assert plan.replaced(sentence_positions=batch.sentence_positions).sentence_cu_seqlens is None
