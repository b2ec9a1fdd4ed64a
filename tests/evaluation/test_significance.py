"""The paired bootstrap: coverage on synthetic data, invariances, few documents; the rows of a table."""

import math

import numpy as np
import pytest

from planlm.evaluation.significance import MIN_DOCUMENTS, NO_DIFFERENCE, DocumentScores, compare_rows, paired_bootstrap


def make_scores(nll, tokens):
    return DocumentScores(np.asarray(nll, dtype=np.float64), np.asarray(tokens, dtype=np.int64))


def draw_pair(generator, num_documents, true_delta):
    """Two scores of documents of very unequal length, sharing what makes a document hard."""
    tokens = np.maximum(20, generator.lognormal(5.5, 0.8, num_documents)).astype(np.int64)
    difficulty = generator.normal(4.0, 1.0, num_documents)
    difference = generator.normal(true_delta, 0.02, num_documents)
    return make_scores((difficulty + difference) * tokens, tokens), make_scores(difficulty * tokens, tokens)


@pytest.mark.parametrize("num_documents", [6, 10, 40])
def test_interval_covers_the_true_difference_as_often_as_it_says(num_documents):
    generator, trials, covered = np.random.default_rng(num_documents), 600, 0
    for trial in range(trials):
        scores, reference = draw_pair(generator, num_documents, true_delta=0.01)
        _, (low, high) = paired_bootstrap(scores, reference, resamples=400, seed=trial)
        covered += low <= 0.01 <= high
    # Over 3,000 trials: .917 at six documents, .925 at ten, .935 at forty; three times the error of 600 trials is .033.
    assert 0.885 <= covered / trials <= 0.985, f"coverage {covered / trials:.3f}"


def test_pairing_makes_the_interval_far_narrower_than_document_difficulty():
    scores, reference = draw_pair(np.random.default_rng(0), 100, true_delta=0.01)
    _, (low, high) = paired_bootstrap(scores, reference)
    assert high - low < 0.03  # difficulty alone would give 4 * 1.0 / sqrt(100) = 0.4


def test_delta_is_the_difference_of_the_token_weighted_means():
    scores, reference = make_scores([10.0, 100.0], [10, 40]), make_scores([20.0, 80.0], [10, 40])
    delta, interval = paired_bootstrap(scores, reference)
    assert delta == pytest.approx(110 / 50 - 100 / 50)
    assert delta == pytest.approx(scores.nll - reference.nll)
    assert interval is None


def test_same_seed_same_interval_and_chunking_changes_nothing(monkeypatch):
    scores, reference = draw_pair(np.random.default_rng(1), 30, true_delta=0.0)
    whole = paired_bootstrap(scores, reference, resamples=300, seed=3)
    assert paired_bootstrap(scores, reference, resamples=300, seed=3) == whole
    assert paired_bootstrap(scores, reference, resamples=300, seed=4) != whole
    monkeypatch.setattr("planlm.evaluation.significance._GATHERED", 100)
    assert paired_bootstrap(scores, reference, resamples=300, seed=3) == whole


def test_documents_without_scored_tokens_do_not_count():
    generator = np.random.default_rng(2)
    scores, reference = draw_pair(generator, 12, true_delta=0.02)
    padded = [make_scores(np.r_[s.nll_sum, 0.0], np.r_[s.tokens, 0]) for s in (scores, reference)]
    assert paired_bootstrap(*padded) == paired_bootstrap(scores, reference)
    assert compare_rows({"a": padded[0], "b": padded[1]}, "b")[0]["documents"] == 12


def test_rows_of_different_tokens_are_refused():
    with pytest.raises(ValueError, match="same documents and tokens"):
        paired_bootstrap(make_scores([1.0], [3]), make_scores([1.0], [4]))
    with pytest.raises(ValueError, match="one token"):
        compare_rows({"a": make_scores([0.0], [0])}, "a")


@pytest.mark.parametrize("num_documents", [1, 2, MIN_DOCUMENTS - 1])
def test_few_documents_give_no_interval_and_say_why(num_documents):
    scores, reference = draw_pair(np.random.default_rng(3), num_documents, true_delta=-1.0)
    row = compare_rows({"soft": scores, "fixed": reference}, "fixed")[0]
    assert row["ci95"] is None
    assert row["delta"] < 0
    assert row["verdict"] == f"no interval: fewer than {MIN_DOCUMENTS} documents"


def test_rows_and_verdicts():
    generator = np.random.default_rng(4)
    tokens = generator.integers(100, 200, 50)
    base = generator.normal(4, 1, 50)
    noise = generator.normal(0, 0.01, 50)
    scores = {
        "none": make_scores((base + 0.05 + noise) * tokens, tokens),
        "fixed": make_scores(base * tokens, tokens),
        "uniform": make_scores((base + noise - noise.mean()) * tokens, tokens),
        "soft": make_scores((base - 0.05 + noise) * tokens, tokens),
    }
    rows = {row["plan"]: row for row in compare_rows(scores, "fixed")}
    assert list(rows) == list(scores)
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "none": "worse", "fixed": "reference", "uniform": NO_DIFFERENCE, "soft": "better",
    }  # fmt: skip
    assert rows["fixed"]["delta"] == 0
    assert rows["fixed"]["ci95"] is None
    low, high = rows["soft"]["ci95"]
    assert low < rows["soft"]["delta"] < high < 0
    for name, row in rows.items():
        assert row["perplexity"] == pytest.approx(math.exp(scores[name].nll_sum.sum() / tokens.sum()))
        assert (row["tokens"], row["documents"]) == (tokens.sum(), 50)
