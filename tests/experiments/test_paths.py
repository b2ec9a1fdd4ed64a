"""The planning toy task: its data, and that joint training learns to plan where a frozen planner cannot."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from planlm.corpus.store import PreparedCorpus
from planlm.experiments.paths import (
    STEPS,
    WORDINGS,
    Choices,
    Paths,
    format_table,
    path,
    run_seed,
    split_paths,
    tree,
    write_corpus,
    write_lm,
)

SMALL = Paths(documents={"train": 60, "validation": 20, "test": 30})


@pytest.mark.parametrize("seed", range(3))
def test_paths_are_unique_and_shortest(seed: int) -> None:
    neighbours = tree(22, seed)
    edges = {frozenset((node, near)) for node in neighbours for near in neighbours[node]}
    assert len(edges) == 21 and sorted(neighbours) == list(range(22))  # with all pairs connected, a tree
    for start, goal in itertools.product(neighbours, repeat=2):
        found = path(neighbours, start, goal)
        assert (found[0], found[-1]) == (start, goal) and len(set(found)) == len(found)
        assert all(frozenset(step) in edges for step in itertools.pairwise(found))


def test_splits_share_no_pair() -> None:
    splits = split_paths(Paths(), seed=0)
    pairs = [(found[0], found[-1]) for paths in splits.values() for found in paths]
    assert len(pairs) == len(set(pairs))
    assert all(len(found) > 3 for paths in splits.values() for found in paths)
    assert [name for name, paths in splits.items() if len(paths) > 20] == ["train", "validation", "test"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    """A few documents."""
    folder = tmp_path_factory.mktemp("paths")
    write_lm(folder / "lm", SMALL, seed=0)
    return write_corpus(folder / "corpus", folder / "lm", SMALL, seed=0)


def test_actions_are_wordings_and_say_nothing_of_nodes(corpus: PreparedCorpus) -> None:
    for document in corpus.split("test"):
        sentences = [document["text"][start:end] for start, end in document["sentence_spans"]]
        assert [WORDINGS[action] for action in document["actions"]] == [text.split()[0] for text in sentences]


def test_what_is_scored_has_several_answers_and_no_goal_in_sight(corpus: PreparedCorpus) -> None:
    choices, neighbours = Choices(corpus, SMALL, seed=0), tree(SMALL.nodes, 0)
    scored = 0
    documents = corpus.split("test")
    for batch, at in choices.batches("test"):
        for row, position in at.nonzero().tolist():
            words = documents[int(batch.documents[row, 0])]["text"].split()
            present, stop, wording = words[position - 2 : position + 1]
            assert stop == "." and wording in STEPS
            near = neighbours[int(present[1:])]
            assert len(near) > 1 and int(words[position + 1][1:]) in near
            assert position - 2 > 1  # the goal is the second word
            scored += 1
    assert scored > 50 and 0.2 < choices.guessing("test") < 0.7


def test_joint_training_learns_to_plan(tmp_path: Path) -> None:
    rows = ("soft, frozen planner", "soft, joint")
    found = run_seed(tmp_path, Paths(), 0, rows)
    frozen, joint = (found[row] for row in rows)
    assert joint > frozen + 0.2
    assert np.abs(frozen - found["guessing"]) < 0.1
    assert "soft, joint" in format_table([found])
