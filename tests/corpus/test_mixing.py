"""Mixed batches: shares are kept, all of a corpus is seen before any comes again, order and position repeat."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest
import torch

from planlm.corpus.batches import IGNORED, PlanBatch, PlanLoader
from planlm.corpus.mixing import MixedLoader
from planlm.errors import InputError

from .test_batches import dataset, random_dataset

SIZES = (48, 10, 33)
"""Documents of each corpus."""
WINDOW = 12


def corpora() -> list[datasets.Dataset]:
    """Three splits; the tokens of the n-th begin at n million."""
    generator = np.random.default_rng(3)
    found = []
    for number, size in enumerate(SIZES):
        split = dataset([generator.integers(1, 9, size=generator.integers(1, 6)).tolist() for _ in range(size)])
        offset = number * 1_000_000
        moved = lambda row, offset=offset: {"input_ids": [id + offset for id in row["input_ids"]]}  # noqa: E731
        found.append(split.map(moved, features=split.features))
    return found


SPLITS = corpora()


def loader(shares: tuple[float, ...] = (0.5, 0.3, 0.2), **changes: object) -> MixedLoader:
    parts = {str(number): (split, share) for number, (split, share) in enumerate(zip(SPLITS, shares, strict=False))}
    return MixedLoader(parts, **{"window": WINDOW, "batch_size": 8, "seed": 5} | changes)  # type: ignore[arg-type]


def sequences(split: datasets.Dataset) -> int:
    return PlanLoader(split, window=WINDOW, batch_size=1, pack=True).num_items


def of(row: torch.Tensor) -> int:
    """Which corpus a sequence is of."""
    found = {int(id) // 1_000_000 for id in row if id}
    assert len(found) == 1
    return found.pop()


def labels(batches: list[PlanBatch]) -> Counter[int]:
    return Counter(int(id) for batch in batches for id in batch.labels.flatten() if id != IGNORED)


def epochs(mixed: MixedLoader, number: int) -> list[list[PlanBatch]]:
    found = []
    for _ in range(number):
        found.append(list(mixed))
        mixed.epoch += 1
    return found


def same(one: PlanBatch, other: PlanBatch) -> bool:
    tensors = list(zip(one.tensors(), other.tensors(), strict=True))
    return all(torch.equal(a, b) for a, b in tensors)


def test_every_epoch_has_the_first_once_and_the_others_by_their_shares() -> None:
    mixed, first = loader(), sequences(SPLITS[0])
    wanted = {0: first, 1: round(first * 0.6), 2: round(first * 0.4)}
    assert mixed.num_items == sum(wanted.values())
    own = labels(list(PlanLoader(SPLITS[0], window=WINDOW, batch_size=8)))
    for batches in epochs(mixed, 3):
        assert len(batches) == mixed.num_batches
        assert Counter(of(row) for batch in batches for row in batch.input_ids) == wanted
        assert Counter({id: count for id, count in labels(batches).items() if id < 1_000_000}) == own


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_all_of_a_corpus_is_seen_before_any_of_it_comes_again(share: float) -> None:
    """A small one several times in an epoch, a large one within several epochs."""
    mixed = loader((1 - share, share))
    found = labels([batch for batches in epochs(mixed, 4) for batch in batches])
    counts = {id: found[id] for id in labels(list(PlanLoader(SPLITS[1], window=WINDOW, batch_size=8)))}
    passed, begun = divmod(4 * (mixed.num_items - sequences(SPLITS[0])), sequences(SPLITS[1]))
    assert set(counts.values()) == {passed, passed + 1} if begun else {passed}


def test_every_batch_is_mixed_and_every_window_what_its_own_corpus_has() -> None:
    mixed = loader()
    kinds = [Counter(of(row) for row in batch.input_ids) for batch in mixed]
    assert sum(len(kind) > 1 for kind in kinds) > len(kinds) / 2
    documents = [row for split in SPLITS for row in split]
    for batch in mixed:
        for at, document in zip(*batch.documents.ge(0).nonzero(as_tuple=True), strict=True):
            row = documents[int(batch.documents[at, document])]
            assert int(batch.input_ids[at, document]) in row["input_ids"]


def test_it_repeats_by_seed_and_differs_between_epochs() -> None:
    one, two = epochs(loader(), 2), epochs(loader(), 2)
    assert all(same(*pair) for pairs in zip(one, two, strict=True) for pair in zip(*pairs, strict=True))
    assert not same(one[0][0], one[1][0]) and not same(one[0][0], next(iter(loader(seed=6))))


@pytest.mark.parametrize("stop", [1, 9, 17, 31])
def test_it_goes_on_where_it_was(stop: int) -> None:
    whole = [batch for batches in epochs(loader(), 3) for batch in batches]
    assert stop < len(whole)
    first, position, seen = loader(), {}, 0
    while seen < stop:
        for _ in islice(first, stop - seen):
            seen, position = seen + 1, first.state_dict()
        first.epoch += seen < stop
    second = loader()
    second.load_state_dict(position)
    rest = list(second)
    second.epoch += 1
    rest += list(second)
    assert all(same(*pair) for pair in zip(rest, whole[stop:], strict=False)) and rest


def test_ranks_share_its_batches() -> None:
    parts = []
    for rank in range(3):
        mixed = loader()
        mixed.share = (rank, 3)
        parts.append(list(mixed))
    whole = list(loader())
    for batch, own in zip(whole, zip(*parts, strict=True), strict=True):
        assert labels([batch]) == labels(list(own))


def test_shuffled_plans_may_be_of_another_corpus() -> None:
    batch = next(iter(loader(with_others=True)))
    assert batch.plan.shuffled_rows is not None


def test_a_corpus_in_which_nothing_is_predicted_is_refused() -> None:
    with pytest.raises(InputError, match=r"^--mix b: none of its documents has a second token to predict"):
        MixedLoader(
            {"--corpus a": (random_dataset(), 0.5), "--mix b": (dataset([[1], [1]]), 0.5)},
            window=8, batch_size=2, seed=0,
        )  # fmt: skip


def test_a_share_of_less_than_a_window_is_one() -> None:
    mixed = loader((0.99999, 0.00001))
    assert Counter(of(row) for batch in mixed for row in batch.input_ids)[1] == 1
