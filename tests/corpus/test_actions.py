"""What actions mean: sizes, typical sentences, terms."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from planlm.config import ActionsConfig, PrepareConfig
from planlm.corpus.actions import describe_actions
from planlm.corpus.prepare import prepare
from planlm.errors import InputError

KINDS = [
    ["The ship left the harbour at dawn.", "A ship sailed to the harbour.", "Their ship sank near the harbour."],
    ["The bread needs more flour.", "Bake the bread with rye flour.", "Some bread is made of white flour."],
]


class KindEncoder:
    """Two directions, one for each kind of sentence; the second sentence of a kind is right on it."""

    name, dim = "kinds", 4

    def encode(self, sentences: list[str]) -> object:
        import numpy as np

        rows = np.zeros((len(sentences), 4), dtype=np.float32)
        for row, sentence in enumerate(sentences):
            kind = next(number for number, kind in enumerate(KINDS) if sentence in kind)
            rows[row, kind] = 1
            rows[row, 2] = {0: 0.2, 1: 0.0, 2: -0.2}[KINDS[kind].index(sentence)]
        return rows


@pytest.fixture
def corpus(settings: Callable[..., PrepareConfig], jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("planlm.corpus.shards.SentenceEncoder", lambda name, precision: KindEncoder())
    rows = [{"text": " ".join(KINDS[0] + KINDS[1][number % 2 :])} for number in range(40)]
    return str(prepare(settings(jsonl(rows), actions=2)).path)


def test_sizes_examples_and_terms(corpus: str) -> None:
    ships, bread = describe_actions(ActionsConfig(corpus=corpus, examples=2, terms=2))
    assert ships.sentences > bread.sentences and ships.share + bread.share == pytest.approx(1)
    assert set(ships.terms) == {"ship", "harbour"} and set(bread.terms) == {"bread", "flour"}
    assert ships.examples[0] == KINDS[0][1] and len(set(ships.examples)) == 2
    assert set(bread.examples) <= set(KINDS[1])


def test_one_action_with_more_examples(corpus: str) -> None:
    every = describe_actions(ActionsConfig(corpus=corpus, examples=1))
    (one,) = describe_actions(ActionsConfig(corpus=corpus, action=every[1].action, examples=1))
    assert one.action == every[1].action and one.terms == every[1].terms and len(one.examples) == 3


def test_unknown_actions_are_refused(corpus: str) -> None:
    with pytest.raises(InputError, match=r"--action 2: .* has the actions 0 to 1"):
        describe_actions(ActionsConfig(corpus=corpus, action=2))


def test_memory_is_bounded_and_typical_words_stay(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = describe_actions(ActionsConfig(corpus=corpus, examples=2, terms=1))
    monkeypatch.setattr("planlm.corpus.actions.MOST_WORDS", 8)
    monkeypatch.setattr("planlm.corpus.actions.TOGETHER", 2)
    few = describe_actions(ActionsConfig(corpus=corpus, examples=2, terms=1))
    assert [one.examples for one in few] == [one.examples for one in whole]
    assert sum(len(one.terms) for one in few) > 0
