"""Splits by hash: stable, in proportion, never empty where they should not be."""

from __future__ import annotations

import numpy as np
import pytest

from planlm.corpus.sources import id_hash
from planlm.corpus.splits import assign_splits
from planlm.corpus.store import SPLITS
from planlm.errors import InputError

HASHES = np.array([id_hash(str(number)) for number in range(20_000)], dtype=np.uint64)
TRAIN, VALIDATION, TEST = range(3)


def test_shares_are_close_to_what_was_asked_for() -> None:
    shares = np.bincount(assign_splits(HASHES, 0.05, 0.1)) / len(HASHES)
    np.testing.assert_allclose(shares, [0.85, 0.05, 0.1], atol=0.01)


def test_documents_stay_when_others_are_added() -> None:
    np.testing.assert_array_equal(assign_splits(HASHES, 0.05, 0.05)[:5000], assign_splits(HASHES[:5000], 0.05, 0.05))
    assert id_hash("12") == 16370802936685099627  # on any machine, in any process


def test_more_validation_leaves_test_as_it_is() -> None:
    few, many = assign_splits(HASHES, 0.05, 0.05), assign_splits(HASHES, 0.2, 0.05)
    np.testing.assert_array_equal(few == TEST, many == TEST)
    assert (many[few == VALIDATION] == VALIDATION).all()


@pytest.mark.parametrize("count", [3, 4, 10, 60])
def test_no_split_is_empty_with_few_documents(count: int) -> None:
    for first in range(0, 600, count):
        assert np.bincount(assign_splits(HASHES[first : first + count], 0.05, 0.05), minlength=3).min() >= 1


def test_the_nearest_document_is_moved() -> None:
    position = np.array([0.5, 0.07, 0.9, 0.12])
    splits = assign_splits((position * 2.0**64).astype(np.uint64), 0.05, 0.05)
    # 0.07 lies nearer to the range of test, but is the only one of its own split.
    assert [SPLITS[split] for split in splits] == ["train", "validation", "train", "test"]


def test_a_share_of_zero_stays_empty() -> None:
    assert set(assign_splits(HASHES[:50], 0.0, 0.1)) == {TRAIN, TEST}
    assert set(assign_splits(HASHES[:1], 0.0, 0.0)) == {TRAIN}


def test_too_few_documents() -> None:
    with pytest.raises(InputError, match=r"2 documents are too few .* train, validation, test; add documents"):
        assign_splits(HASHES[:2], 0.05, 0.05)
