"""Which document goes to which split: by a stable hash of its id, so that it stays there when others are added."""

from __future__ import annotations

import numpy as np

from planlm.corpus.store import SPLITS
from planlm.errors import InputError


def assign_splits(hashes: np.ndarray, validation_fraction: float, test_fraction: float) -> np.ndarray:
    """Split of every document.

    The hash, as a number from 0 to 1, decides: test lies at the bottom, validation above it, training above both.
    Where a split that should have documents gets none, as happens with few, the document whose hash is nearest to
    its bounds is moved there from a split that has others.

    Args:
        hashes: uint64 [documents].
        validation_fraction, test_fraction: 0 leaves a split empty.

    Returns:
        int8 [documents], numbers of `SPLITS`.

    Raises:
        InputError: fewer documents than splits.
    """
    position = hashes / 2.0**64
    bounds = {"test": (0.0, test_fraction), "validation": (test_fraction, test_fraction + validation_fraction)}
    bounds["train"] = (bounds["validation"][1], 1.0)
    wanted = [name for name in SPLITS if bounds[name][1] > bounds[name][0]]
    if len(hashes) < len(wanted):
        raise InputError(
            f"{len(hashes)} documents are too few for the splits {', '.join(wanted)}; add documents (a .txt file is "
            "one), or set --validation-fraction or --test-fraction to 0"
        )
    splits = np.full(len(hashes), SPLITS.index("train"), dtype=np.int8)
    for name in ("validation", "test"):
        low, high = bounds[name]
        splits[(position >= low) & (position < high)] = SPLITS.index(name)
    for name in wanted:
        if not (splits == SPLITS.index(name)).any():
            low, high = bounds[name]
            distance = np.maximum(low - position, position - high)
            lonely = np.bincount(splits, minlength=len(SPLITS))[splits] == 1
            splits[np.argmin(np.where(lonely, np.inf, distance))] = SPLITS.index(name)
    return splits
