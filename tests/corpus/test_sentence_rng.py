"""Draws that belong to sentences."""

from __future__ import annotations

import torch

from planlm.corpus.batches import PlanLoader
from planlm.corpus.sentence_rng import _splitmix64, uniform_by_sentence

from .test_batches import dataset


def test_first_number_of_splitmix64() -> None:
    """Of seed 0: 16294208416658607535, published with the generator."""
    assert int(_splitmix64(torch.zeros(1, dtype=torch.int64))[0]) % 2**64 == 16294208416658607535


def test_a_sentence_has_its_number_whatever_batch_it_is_in() -> None:
    rows = dataset([[2, 1] * 6] * 60)
    numbers: list[dict[tuple[int, int], float]] = []
    for size in (3, 8):
        found: dict[tuple[int, int], float] = {}
        for batch in PlanLoader(rows, window=16, batch_size=size, pack=True):
            drawn = uniform_by_sentence(batch, seed=5, step=7)
            for at, position in (batch.plan.segment_ids >= 0).nonzero().tolist():
                segment = int(batch.plan.segment_ids[at, position])
                row, place = batch.plan.segment_rows[segment].tolist()
                key = (int(batch.documents[at, position]), int(batch.plan.sentence_positions[row, place]))
                assert found.setdefault(key, float(drawn[segment])) == float(drawn[segment])
        numbers.append(found)
    assert numbers[0] == numbers[1]
    values = torch.tensor(list(numbers[0].values()))
    assert len(values) > 500 and len(values.unique()) == len(values)
    assert abs(float(values.mean()) - 0.5) < 0.05 and float(values.min()) >= 0 and float(values.max()) < 1
    other = uniform_by_sentence(batch, seed=5, step=8)
    assert not torch.equal(other, drawn)
