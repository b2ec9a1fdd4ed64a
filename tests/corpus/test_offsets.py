"""Offsets of a batch against loops over its positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from planlm.corpus.offsets import segment_bounds
from planlm.plan_inputs import PlanInputs


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
