"""Planner metrics against figures worked out by hand."""

import math

import pytest
import torch
from torch import nn

from planlm.evaluation.planner_metrics import calibration, calibration_error, followed, planner_metrics
from planlm.model import Planner


class Oracle(nn.Module):
    """Stands in for a planner: its hidden states are the logits it is told; no two documents are of one length."""

    def __init__(self, logits):
        super().__init__()
        self.logits = {len(one): one for one in logits}  # [n, K] each
        num_actions = logits[0].shape[1]
        self.head = nn.Linear(num_actions, num_actions, bias=False)
        self.head.weight.data = torch.eye(num_actions)
        self.ahead = ()

    def forward(self, sentence_embeddings, sentence_positions, **_):
        hidden = torch.full((*sentence_positions.shape, self.head.weight.shape[0]), 1e9)
        for row, positions in enumerate(sentence_positions.tolist()):
            begins = [at for at, position in enumerate(positions) if position == 0]
            for begin, end in zip(begins, [*begins[1:], len(positions)], strict=True):
                if end - begin in self.logits:
                    hidden[row, begin:end] = self.logits[end - begin]
        return hidden


def actions_of(corpus, split):
    return [list(actions) for actions in corpus.split(split)["actions"]]


@pytest.fixture
def corpus(make_corpus):
    return make_corpus(
        test=["The cat sat on the mat. It was warm there. Nobody knew.", "Nobody knew. Boats stayed in."]
    )


def test_against_hand_computed_metrics(corpus):
    """Five sentences whose true actions get ranks 1, 2, 1, 7, 6 of seven, with known probabilities."""
    actions = actions_of(corpus, "test")
    assert [len(document) for document in actions] == [3, 2]
    ranks = [[1, 2, 1], [7, 6]]
    logits = [torch.zeros(3, 7), torch.zeros(2, 7)]
    for document in range(2):
        for sentence, (action, rank) in enumerate(zip(actions[document], ranks[document], strict=True)):
            order = [other for other in range(7) if other != action]
            order.insert(rank - 1, action)
            logits[document][sentence, order] = torch.arange(7, 0, -1).float()
    counts = torch.tensor([4, 0, 3, 9, 1, 2, 1])
    metrics = planner_metrics(Oracle(logits), corpus.split("test"), counts, batch_size=2)

    flat = [action for document in actions for action in document]
    normalizer = math.log(sum(math.exp(value) for value in range(1, 8)))
    assert metrics["accuracy@1"] == 2 / 5
    assert metrics["accuracy@5"] == 3 / 5
    assert metrics["accuracy@10"] == 1.0
    assert metrics["mrr"] == pytest.approx((1 + 1 / 2 + 1 + 1 / 7 + 1 / 6) / 5)
    assert metrics["nll"] == pytest.approx(normalizer - (7 + 6 + 7 + 1 + 2) / 5)
    assert metrics["unigram_nll"] == pytest.approx(-sum(math.log((counts[a] + 1) / 27) for a in flat) / 5)
    assert metrics["unigram_accuracy@1"] == pytest.approx(flat.count(3) / 5)
    repeats = [document[i] == (document[i - 1] if i else 3) for document in actions for i in range(len(document))]
    assert metrics["repeat_last_accuracy"] == pytest.approx(sum(repeats) / 5)
    assert metrics["ece"] == pytest.approx(abs(math.exp(7 - normalizer) - 2 / 5))
    assert (metrics["sentences"], metrics["num_actions"]) == (5, 7)


def test_a_planner_that_says_nothing_scores_like_chance(corpus):
    """All logits equal: ties must not count as hits."""
    flat = [action for document in actions_of(corpus, "test") for action in document]
    metrics = planner_metrics(Oracle([torch.zeros(3, 7), torch.zeros(2, 7)]), corpus.split("test"), torch.ones(7))
    assert metrics["accuracy@1"] == pytest.approx(flat.count(0) / 5)
    assert metrics["nll"] == pytest.approx(math.log(7))


def test_batches_and_chunks_change_nothing_and_the_mode_is_kept(make_corpus, monkeypatch):
    corpus = make_corpus()
    planner = Planner(16, 7, layers=1, heads=2).train()
    dataset = corpus.split("test")
    one = planner_metrics(planner, dataset, corpus.action_counts, batch_size=1)
    assert planner.training
    monkeypatch.setattr("planlm.evaluation.planner_metrics._LOGITS", 20)
    other = planner_metrics(planner, dataset, corpus.action_counts, batch_size=8)
    for mine, its in zip(one.pop("calibration"), other.pop("calibration"), strict=True):
        assert its == pytest.approx(mine, rel=1e-6)
    assert other == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        # Bins of 1/15: .03 alone in the first, .90 and .92 in the 14th (.867 to .933], 1.0 in the last.
        ([0.03, 0.90, 0.92, 1.0], [False, True, False, True], (0.03 + abs(0.90 + 0.92 - 1) + 0) / 4),
        ([1.0, 1.0], [True, True], 0.0),
        ([1.0, 1.0], [False, False], 1.0),
        ([1 / 15, 1 / 15 + 1e-9], [True, False], (1 - 1 / 15 + 1 / 15) / 2),
    ],
)
def test_calibration_error(confidence, correct, expected):
    bins = calibration(torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct))
    assert calibration_error(bins) == pytest.approx(expected, abs=1e-7)
    assert sum(one["sentences"] for one in bins) == len(confidence)


def test_calibration_says_how_sure_and_how_right():
    bins = calibration(torch.tensor([0.90, 0.92, 0.03]), torch.tensor([True, False, True]))
    assert bins == [
        {"confidence": pytest.approx(0.03), "accuracy": 1.0, "sentences": 1},
        {"confidence": pytest.approx(0.91), "accuracy": 0.5, "sentences": 2},
    ]


def test_a_document_is_followed_sentence_by_sentence(corpus, monkeypatch):
    """The first that is long enough, with the distribution at the temperature."""
    monkeypatch.setattr("planlm.evaluation.planner_metrics.EXAMPLE", 2)
    logits = torch.tensor([[0.0, 3.0, 0.0, 0.0, 2.0, 0.0, 1.0]]).repeat(3, 1)
    found = followed(Oracle([logits]), corpus.split("test").select([0]), temperature=2.0)
    document = corpus.split("test")[0]
    assert found["id"] == document["id"]
    assert [one["sentence"] for one in found["sentences"]] == ["The cat sat on the mat.", "It was warm there."]
    assert [one["action"] for one in found["sentences"]] == list(document["actions"][:2])
    expected = [(each["action"], each["probability"]) for each in found["sentences"][0]["expected"]]
    assert [action for action, _ in expected] == [1, 4, 6]
    normalizer = sum(math.exp(value / 2) for value in logits[0].tolist())
    assert [value for _, value in expected] == pytest.approx(
        [math.exp(value / 2) / normalizer for value in (3, 2, 1)], abs=1e-4
    )
