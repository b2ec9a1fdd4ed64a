"""What actions mean: sizes, typical sentences, terms."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from planlm import show
from planlm.config import ActionsConfig, PrepareConfig
from planlm.corpus.actions import _distinctive, describe_actions, label_actions
from planlm.corpus.labels import LABELS, read_labels
from planlm.corpus.prepare import prepare
from planlm.corpus.store import PreparedCorpus
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


def test_places_and_what_follows(corpus: str) -> None:
    """Every document is two or three sentences of ships, then two or three of bread."""
    ships, bread = describe_actions(ActionsConfig(corpus=corpus))
    assert sum(ships.places) == pytest.approx(1, abs=1e-3) and sum(bread.places) == pytest.approx(1, abs=1e-3)
    assert ships.places[0] > 0 == ships.places[4] and bread.places[4] > 0 == bread.places[0]
    shares = {then.action: then.share for then in ships.followed_by}
    assert shares == pytest.approx({ships.action: 2 / 3, bread.action: 1 / 3})
    assert [then.action for then in bread.followed_by] == [bread.action]


def test_borderline_sentences_are_nearest_to_another_action(corpus: str) -> None:
    ships, bread = describe_actions(ActionsConfig(corpus=corpus, examples=1))
    assert [one.other for one in ships.borderline] == [bread.action]
    assert ships.borderline[0].text in KINDS[0] and ships.borderline[0].text != ships.examples[0]


def test_words_of_every_action_are_no_terms() -> None:
    """As c-TF-IDF has them where actions are few and large."""
    ships = Counter(the=1010, ship=40, of=800, harbour=30, sea=300)
    bread = Counter(the=1000, flour=40, of=800, oven=30, rye=300)
    assert _distinctive([ships, bread], 3) == [["sea", "ship", "harbour"], ["rye", "flour", "oven"]]


def test_labels_are_made_in_preparation_and_kept(corpus: str) -> None:
    made = read_labels(Path(corpus), 2)
    described = describe_actions(ActionsConfig(corpus=corpus))
    assert made is not None and {one.action: one.label for one in described} == dict(enumerate(made))
    assert all(set(one.label.split()) & set(one.terms) for one in described)
    changed = describe_actions(ActionsConfig(corpus=corpus, action=0, name=("0=At  sea", "1=Baking")))
    assert changed[0].label == "At sea" and read_labels(Path(corpus), 2) == ["At sea", "Baking"]
    label_actions(PreparedCorpus.load(corpus))
    assert read_labels(Path(corpus), 2) == ["At sea", "Baking"]


def test_labels_are_made_of_documents_from_everywhere(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, chosen = PreparedCorpus.load(corpus), []
    monkeypatch.setattr(datasets.Dataset, "select", lambda self, rows: chosen.extend(rows) or self)
    documents = len(prepared.split("train"))
    monkeypatch.setattr("planlm.corpus.actions.LABELLED_FROM", documents * 2 // 3)
    (prepared.path / LABELS).unlink()
    label_actions(prepared)
    assert len(set(chosen)) == documents * 2 // 3 and documents - max(chosen) <= 2


def test_naming_changes_no_fingerprint(corpus: str) -> None:
    before = PreparedCorpus.load(corpus).fingerprint
    describe_actions(ActionsConfig(corpus=corpus, name=("0=ships",)))
    assert PreparedCorpus.load(corpus).fingerprint == before


def test_a_corpus_without_labels_gets_them(corpus: str) -> None:
    (Path(corpus) / LABELS).unlink()
    assert all(one.label for one in describe_actions(ActionsConfig(corpus=corpus)))
    assert read_labels(Path(corpus), 2) is not None


@pytest.mark.parametrize(
    "name", ["ships", "=ships", "2=ships", "-1=ships", "0=", "0=1", "0=*", "0=a,b", "0=" + 61 * "x"]
)
def test_names_that_cannot_be(corpus: str, name: str) -> None:
    before = read_labels(Path(corpus), 2)
    with pytest.raises(InputError, match="--name"):
        describe_actions(ActionsConfig(corpus=corpus, name=("1=bread", name)))
    assert read_labels(Path(corpus), 2) == before


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"labels": ["a"]}', '{"labels": ["a", 1]}', '{"labels": ["a", "\\u001b[1m"]}']
)
def test_damaged_labels_are_named(corpus: str, content: str) -> None:
    (Path(corpus) / LABELS).write_text(content)
    with pytest.raises(InputError, match=LABELS):
        describe_actions(ActionsConfig(corpus=corpus))


def test_a_run_gets_the_labels_of_its_corpus_alone(corpus: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    with pytest.raises(InputError, match="no trained model"):
        describe_actions(ActionsConfig(corpus=corpus, run=str(run)))
    (run / "model" / "config.json").write_text('{"model_type": "planlm"}')
    (run / "identity.json").write_text('{"corpus": "another"}')
    with pytest.raises(InputError, match="trained on another corpus"):
        describe_actions(ActionsConfig(corpus=corpus, run=str(run)))
    (run / "identity.json").write_text(json.dumps({"corpus": PreparedCorpus.load(corpus).fingerprint}))
    describe_actions(ActionsConfig(corpus=corpus, run=str(run), name=("0=At sea",)))
    assert json.loads((run / "model" / "config.json").read_text()) == {
        "model_type": "planlm",
        "action_labels": ["At sea", read_labels(Path(corpus), 2)[1]],
    }


def test_what_is_shown_says_all_of_it(corpus: str) -> None:
    settings = ActionsConfig(corpus=corpus, examples=1, name=("0=At sea",))
    text = show.actions(describe_actions(settings), settings)
    assert "action 0 (At sea): " in text and "in the fifths of a document: " in text and "followed by: " in text
    assert dataclasses.asdict(describe_actions(settings)[0]).keys() >= {"label", "borderline", "places", "followed_by"}
