"""Windows and batches against the rules written out token by token."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch

from planlm.corpus.batches import IGNORED, PlanBatch, PlanLoader, SentenceLoader, partners, windows
from planlm.corpus.offsets import few_sizes
from planlm.corpus.store import document_features
from planlm.errors import InputError

DIM = 4


def dataset(sentence_tokens: list[list[int]]) -> datasets.Dataset:
    """A split whose documents have these tokens per sentence; ids count up, embeddings name document and sentence."""
    generator = np.random.default_rng(0)
    rows = []
    next_id = 1
    for document, counts in enumerate(sentence_tokens):
        rows.append(
            {
                "id": str(document),
                "text": "",
                "input_ids": list(range(next_id, next_id + sum(counts))),
                "sentence_spans": [[0, 1]] * len(counts),
                "sentence_tokens": counts,
                "embeddings": [[document + 1, sentence + 1, 0.5, -1] for sentence in range(len(counts))],
                "actions": generator.integers(0, 16, len(counts)).tolist(),
            }
        )
        next_id += sum(counts)
    return datasets.Dataset.from_list(rows, features=document_features(DIM))


def random_dataset() -> datasets.Dataset:
    generator = np.random.default_rng(1)
    lengths = [generator.integers(0, 30, size=generator.integers(1, 9)).tolist() for _ in range(40)]
    for counts in lengths:
        counts[0] += not sum(counts)
    return dataset([*lengths, [1], [2], [0, 1], [0, 0, 2], [200], [1, 0, 0, 70, 0, 3], [17], [16, 1], [8, 8]])


def owners(row: dict[str, list[int]]) -> np.ndarray:
    """Sentence of every token."""
    return np.repeat(np.arange(len(row["sentence_tokens"])), row["sentence_tokens"])


def sentence_numbers(batch: PlanBatch) -> torch.Tensor:
    """[S]: which sentence of its document each segment belongs to."""
    return batch.plan.sentence_positions[batch.plan.segment_rows[:, 0], batch.plan.segment_rows[:, 1]]


def check_segments(batch: PlanBatch) -> int:
    """Segments are sorted over the batch, each is somebody's, and those behind them have no action; their number."""
    segments = batch.plan.segment_ids[batch.plan.segment_ids >= 0]
    count = int(segments.max()) + 1
    assert (segments.diff() >= 0).all() and segments.unique().tolist() == list(range(count))
    assert (batch.actions[:count] >= 0).all() and (batch.actions[count:] == -1).all()
    assert len(batch.actions) == len(batch.plan.segment_rows) == few_sizes(count)
    return count


def check_window(batch: PlanBatch, at: int, row: dict[str, list[int]], document: int) -> list[int]:
    """Hold one window against its document; returns the positions of the tokens that it scores."""
    length = int((batch.plan.segment_ids[at] >= 0).sum())
    assert (batch.plan.segment_ids[at, length:] == -1).all() and (batch.input_ids[at, length:] == 0).all()
    assert (batch.labels[at, length:] == IGNORED).all()
    ids = np.array(row["input_ids"])
    start = int(batch.input_ids[at, 0]) - ids[0]
    np.testing.assert_array_equal(batch.input_ids[at, :length], ids[start : start + length])
    scored = []
    for position in range(length):
        target = start + position + 1
        if batch.labels[at, position] != IGNORED:
            assert batch.labels[at, position] == ids[target]
            scored.append(target)
        segment = batch.plan.segment_ids[at, position]
        number = owners(row)[target]
        assert sentence_numbers(batch)[segment] == number
        assert batch.actions[segment] == row["actions"][number]
        planned_in, place = batch.plan.segment_rows[segment].tolist()
        before = batch.plan.sentence_embeddings[planned_in, place - number : place + 1]
        assert batch.plan.sentence_positions[planned_in, place - number : place + 1].tolist() == list(range(number + 1))
        assert (before[0] == 0).all()
        assert (before[1:, 0] == document + 1).all() and before[1:, 1].tolist() == list(range(1, number + 1))
    return scored


@pytest.mark.parametrize(
    ("window", "stride"), [(16, None), (16, 16), (16, 5), (16, 1), (1, None), (2, 1), (500, None), (500, 7)]
)
def test_every_token_but_the_first_is_scored_once(window: int, stride: int | None) -> None:
    rows = random_dataset()
    plain = list(rows)
    counts = [np.zeros(len(row["input_ids"]), dtype=int) for row in plain]
    loader = PlanLoader(rows, window=window, batch_size=7, stride=stride, shuffle=stride is None)
    batches = list(loader)
    assert len(batches) == loader.num_batches
    for batch in batches:
        check_segments(batch)
        for at, document in enumerate(batch.documents[:, 0].tolist()):
            counts[document][check_window(batch, at, plain[document], document)] += 1
    for count in counts:
        assert count[0] == 0 and (count[1:] == 1).all()


def test_plan_of_the_next_window_s_sentence_reaches_the_last_position() -> None:
    batch = next(iter(PlanLoader(dataset([[4, 4]]), window=4, batch_size=2, shuffle=False)))
    assert sentence_numbers(batch)[batch.plan.segment_ids[0]].tolist() == [0, 0, 0, 1]
    assert sentence_numbers(batch)[batch.plan.segment_ids[1, :3]].tolist() == [1, 1, 1]
    assert batch.labels.tolist() == [[2, 3, 4, 5], [6, 7, 8, IGNORED]]


def test_a_sentence_longer_than_the_window_is_a_segment_of_each() -> None:
    batch = next(iter(PlanLoader(dataset([[2, 9, 1]]), window=4, batch_size=9, shuffle=False)))
    assert sentence_numbers(batch)[: check_segments(batch)].tolist() == [0, 1, 1, 1, 2]


def test_later_windows_score_only_what_is_new() -> None:
    index = windows(dataset([[10], [1], [3]]), window=4, stride=2)
    assert index.document.tolist() == [0, 0, 0, 0, 2]
    assert index.start.tolist() == [0, 2, 4, 6, 0]
    assert index.length.tolist() == [4, 4, 4, 3, 2]
    assert index.unscored.tolist() == [0, 2, 2, 2, 0]


def test_embeddings_end_before_the_last_sentence_needed_and_documents_come_once() -> None:
    loader = PlanLoader(dataset([[4, 4, 4, 4], [3, 3]]), window=4, batch_size=3, shuffle=False)
    first, second = loader
    assert first.documents[:, 0].tolist() == [0, 0, 0]
    assert first.plan.sentence_positions.tolist() == [[0, 1, 2, 3]]  # the last position predicts the fourth sentence
    assert second.documents[:, 0].tolist() == [0, 1, 1]
    assert sorted(second.plan.sentence_positions.flatten().tolist()) == [0, 0, 1, 1, 2, 3]
    (only,) = PlanLoader(dataset([[5]]), window=4, batch_size=1, shuffle=False)
    assert only.plan.sentence_embeddings.shape == (1, 2, DIM) and only.plan.sentence_embeddings.abs().sum() == 0


def test_documents_share_the_planner_s_rows() -> None:
    """One long document and many short ones: few places stay empty, where a row each would leave nine in ten."""
    rows = dataset([[2] * 100, *([[2] * 7] * 30), *([[2] * 3] * 20)])
    batch = next(iter(SentenceLoader(rows, batch_size=51, shuffle=False)))
    assert batch.actions.shape == (2, 192) and (batch.actions != IGNORED).sum() == 100 + 210 + 60


def test_sizes_are_even_and_few_and_hardly_larger() -> None:
    for size in range(1, 3000):
        rounded = few_sizes(size)
        assert size <= rounded <= max(size + 1, size * 9 / 8) and rounded % 2 == 0 and few_sizes(rounded) == rounded
    assert len({few_sizes(size) for size in range(1024, 2049)}) == 9


def test_shapes_of_batches_are_few() -> None:
    """Every shape has kernels compiled for it that stay in memory: batch after batch would add some."""
    generator = np.random.default_rng(2)
    rows = dataset([generator.integers(1, 12, size=generator.integers(5, 60)).tolist() for _ in range(600)])
    batches = list(PlanLoader(rows, window=64, batch_size=8, pack=True))
    places = {batch.plan.sentence_positions.numel() for batch in batches}
    segments = {len(batch.actions) for batch in batches}
    assert len(batches) > 200 and len(places) < 20 and len(segments) < 10


def test_selected_documents_read_like_others() -> None:
    rows = random_dataset().select([7, 3, 44])
    for batch in PlanLoader(rows, window=16, batch_size=2, shuffle=False):
        for at, document in enumerate(batch.documents[:, 0].tolist()):
            check_window(batch, at, rows[document], int(rows[document]["id"]))


@pytest.mark.parametrize("kind", ["plan", "sentence"])
def test_order_depends_on_seed_and_epoch_and_resumes(kind: str) -> None:
    rows = random_dataset()

    def make(seed: int = 3) -> PlanLoader | SentenceLoader:
        if kind == "plan":
            return PlanLoader(rows, window=16, batch_size=5, seed=seed)
        return SentenceLoader(rows, batch_size=5, seed=seed)

    def contents(batches: object) -> list[torch.Tensor]:
        return [batch.actions for batch in batches]  # type: ignore[attr-defined]

    def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    loader = make()
    first = contents(loader)
    assert same(first, contents(loader)) and same(first, contents(make()))
    assert not same(first, contents(make(seed=4)))
    loader.epoch = 1
    second = contents(loader)
    assert not same(first, second)
    assert loader.state_dict() == {"epoch": 1, "batch": 0}

    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    assert same(contents(resumed), second[3:])
    assert same(contents(resumed), second)  # and then whole epochs again


def test_a_state_stored_after_the_last_batch_goes_on_with_the_next_epoch() -> None:
    loader = PlanLoader(random_dataset(), window=16, batch_size=5)
    iterator = iter(loader)
    for _ in range(loader.num_batches):
        next(iterator)
    resumed = PlanLoader(random_dataset(), window=16, batch_size=5)
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == [] and resumed.state_dict()["batch"] == 0


def test_last_batch_may_be_smaller() -> None:
    rows = dataset([[3]] * 5)
    assert [len(batch.labels) for batch in PlanLoader(rows, window=4, batch_size=2)] == [2, 2, 1]


def test_whole_documents() -> None:
    rows = random_dataset()
    loader = SentenceLoader(rows, batch_size=6, shuffle=False)
    for number, batch in enumerate(loader):
        assert batch.sentence_embeddings.dtype == torch.float32
        expected = {document: rows[document] for document in range(6 * number, min(6 * number + 6, len(rows)))}
        real = batch.actions != IGNORED
        for at, place in ((batch.sentence_positions == 0) & real).nonzero().tolist():
            until = next(
                (end for end in range(place + 1, real.shape[1]) if batch.sentence_positions[at, end] == 0),
                real.shape[1],
            )
            actions = batch.actions[at, place:until].tolist()
            embeddings = batch.sentence_embeddings[at, place:until].tolist()
            assert batch.sentence_positions[at, place:until].tolist() == list(range(len(actions)))
            document = next(  # embeddings name it, where it has any in front of its last sentence
                document
                for document, row in expected.items()
                if row["actions"] == actions and embeddings == [[0.0] * DIM, *row["embeddings"][:-1]]
            )
            del expected[document]
        assert not expected
        assert batch.sentence_embeddings[~real].abs().sum() == 0


@pytest.mark.parametrize(
    "arguments", [{"stride": 0}, {"stride": 9}, {"batch_size": 0}, {"pack": True, "shuffle": False}]
)
def test_bad_arguments_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        PlanLoader(dataset([[3]]), **({"window": 8, "batch_size": 1} | arguments))


def test_moves_to_a_device() -> None:
    batch = next(iter(PlanLoader(dataset([[3, 2]]), window=4, batch_size=1))).to("meta")
    assert batch.labels.device.type == batch.plan.sentence_embeddings.device.type == "meta"


@pytest.mark.parametrize("window", [3, 16, 500])
def test_packed_epochs_have_every_token_but_the_first_as_a_label_once(window: int) -> None:
    rows = random_dataset()
    loader = PlanLoader(rows, window=window, batch_size=3, pack=True, seed=5)
    for epoch in range(2):
        loader.epoch = epoch
        labels = [[] for _ in rows]  # type: ignore[var-annotated]
        batches = list(loader)
        assert len(batches) == loader.num_batches
        for batch in batches:
            check_segments(batch)
            for at, position in (batch.labels != IGNORED).nonzero().tolist():
                document = int(batch.documents[at, position])
                labels[document].append(int(batch.labels[at, position]))
                number = int(sentence_numbers(batch)[batch.plan.segment_ids[at, position]])
                owners = np.repeat(np.arange(len(rows[document]["actions"])), rows[document]["sentence_tokens"])
                target = rows[document]["input_ids"].index(int(batch.labels[at, position]))
                assert owners[target] == number
        for row, found in zip(rows, labels, strict=True):
            assert sorted(found) == row["input_ids"][1:]


def test_positions_begin_anew_in_every_window_and_ids_follow_each_other_within() -> None:
    batch = next(iter(PlanLoader(dataset([[3], [4], [5], [2]]), window=10, batch_size=4, pack=True)))
    assert batch.input_ids.shape == (1, 10)  # 2 + 3 + 4 + 1 labels in one row
    starts = batch.position_ids[0] == 0
    assert int(starts.sum()) == 4
    ids, documents = batch.input_ids[0], batch.documents[0]
    same = documents[1:] == documents[:-1]
    assert (ids.diff()[same] == 1).all() and torch.equal(~same, starts[1:])


def test_a_packed_run_resumes_within_an_epoch() -> None:
    def make() -> PlanLoader:
        return PlanLoader(random_dataset(), window=16, batch_size=2, pack=True)

    loader = make()
    whole = [batch.input_ids for batch in loader]
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    rest = [batch.input_ids for batch in resumed]
    assert len(rest) == len(whole) - 4 and all(map(torch.equal, rest, whole[4:]))


def test_partners_are_neighbours_by_number_of_sentences() -> None:
    rows = dataset([[1], [1] * 5, [2], [1] * 4, [3, 1], [1] * 4, [1] * 9])
    lengths = [1, 5, 1, 4, 2, 4, 9]
    found = partners(rows).tolist()
    assert found == [2, 5, 0, 4, 3, 1, 1]
    assert [found[found[document]] for document in range(6)] == list(range(6))
    order = np.random.default_rng(2).permutation(7)
    shuffled = partners(rows.select(order))
    assert [order[other] for other in shuffled[np.argsort(order)]] == found, "the order of rows is none of it"
    assert max(abs(lengths[other] - lengths[document]) for document, other in enumerate(found)) == 4
    with pytest.raises(InputError, match=r"selection shuffled: .* there is one document; take more"):
        partners(rows.select([3]))


@pytest.mark.parametrize("pack", [True, False])
def test_shuffled_rows_are_of_the_partners_sentence(pack: bool) -> None:
    """Whatever the batch: the partner's sentence of the same number, else its last, seen with all before it."""
    rows = random_dataset()
    others, lengths = partners(rows), [len(row["actions"]) for row in rows]
    loaders = [PlanLoader(rows, window=16, batch_size=5, pack=pack, with_others=others) for others in (True, False)]
    for batch, without in zip(*loaders, strict=True):
        assert without.plan.shuffled_rows is None and torch.equal(batch.labels, without.labels)
        plan, count = batch.plan, check_segments(batch)
        at = plan.segment_ids >= 0
        owner = torch.zeros(count, dtype=torch.int64)
        owner[plan.segment_ids[at]] = batch.documents[at]
        for segment, number in enumerate(sentence_numbers(batch)[:count].tolist()):
            own, other = int(owner[segment]), int(others[owner[segment]])
            for (row, place), document in ((plan.segment_rows[segment], own), (plan.shuffled_rows[segment], other)):
                expected = min(number, lengths[document] - 1)
                assert plan.sentence_positions[row, place] == expected
                before = plan.sentence_embeddings[row, place - expected + 1 : place + 1]
                assert (before[:, 0] == document + 1).all() and before[:, 1].tolist() == list(range(1, expected + 1))
        assert (plan.shuffled_rows[count:] == 0).all() and len(plan.shuffled_rows) == len(plan.segment_rows)
