"""Metrics of generated texts against values computed by hand; intervals against those of perplexity."""

import math

import numpy as np
import pyarrow as pa
import pytest

from planlm.evaluation import generation_metrics as measure
from planlm.evaluation.generation_statistics import METRICS, Continuations, compare, make_rows, values
from planlm.evaluation.significance import DocumentScores, paired_bootstrap


def test_rouge_2():
    # Bigrams: 5 each, of which "the cat", "cat sat", "sat on" are shared.
    scores = measure.rouge2(["The cat sat on the mat.", "x", "a b"], ["the cat sat on a mat", "a b", "a b"])
    assert scores == pytest.approx([0.6, 0.0, 1.0])


def test_edit_distances():
    distances, normalised = measure.edit_distances([[1, 2, 3], [], [], [5, 5]], [[1, 3, 4], [], [1], [5, 5]])
    assert distances == [2, 0, 1, 0]
    assert normalised == pytest.approx([2 / 3, 0, 1, 0])


def test_distinct_and_repetition():
    assert [measure.distinct([1, 1, 2, 1, 1], n) for n in (1, 2, 3)] == [2 / 5, 3 / 4, 1]
    assert measure.distinct([1], 2) == 1
    assert measure.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert measure.repetition([7] * 8) == pytest.approx(4 / 5)
    assert measure.repetition([1, 2, 3]) == 0


def test_bigrams_with_witten_bell_smoothing():
    tables = [pa.table({"actions": [[0, 1, 0], []]}), pa.table({"actions": [[0, 0]]})]
    critic = measure.BigramCritic.fit(iter(tables), 3)
    one = (4 + 1) / (5 + 3), (1 + 1) / (5 + 3), 1 / (5 + 3)  # P(a)
    # After 0 there were 0 and 1, once each, and nothing across the documents; after 1 there was 0.
    expected = [[(1 + 2 * one[0]) / 4, (1 + 2 * one[1]) / 4, 2 * one[2] / 4]]
    expected += [[(1 + one[0]) / 2, one[1] / 2, one[2] / 2], list(one)]
    for before, row in enumerate(expected):
        assert sum(row) == pytest.approx(1)
        for after, probability in enumerate(row):
            assert critic.nll(before, [after]) == pytest.approx(-math.log(probability))
    assert critic.nll(0, [1, 2, 0]) == pytest.approx(-math.log(expected[0][1] * expected[1][2] * expected[2][0]))
    assert critic.nll(0, []) == 0


def test_a_sentence_that_was_cut_off_counts_only_alone():
    assert measure.finished_sentences(" It was. Dr. Smith came in! He") == ["It was.", "Dr. Smith came in!"]
    assert measure.finished_sentences("It was. He came.") == ["It was.", "He came."]
    assert measure.finished_sentences(" and so on") == ["and so on"]
    assert measure.finished_sentences(" \n") == []


def test_actions_are_those_of_preparation(make_corpus, encoder):
    corpus = make_corpus()
    rows = corpus.split("test")
    found = measure.action_sequences(rows["text"], encoder, corpus.codebook.numpy())
    assert found == [list(actions) for actions in rows["actions"]]
    assert measure.action_sequences(["", " "], encoder, corpus.codebook.numpy()) == [[], []]


def test_mauve_tells_texts_apart_silently_and_twice_alike(capfd):
    generator = np.random.default_rng(0)
    near, other = generator.standard_normal((2, 60, 8)).astype(np.float32)
    far = other + np.array([20, *[0] * 7], np.float32)
    assert measure.mauve(near, near, 0) == pytest.approx(1, abs=1e-3)
    assert measure.mauve(far, near, 0) < 0.1 < measure.mauve(other, near, 0)
    assert measure.mauve(other, near, 3) == measure.mauve(other, near, 3)
    assert capfd.readouterr().err == ""


def continuations(generator, shift, num=40):
    per_prompt = {name: generator.random(num) + shift for name in METRICS if name not in ("mauve", "latent_perplexity")}
    counts = generator.integers(1, 6, num).astype(float)
    return Continuations(per_prompt, ((1 + shift) * counts, counts), generator.random((num, 4)).astype(np.float32))


def test_rows_have_intervals_over_prompts():
    generator = np.random.default_rng(0)
    plain, planned, human = (continuations(generator, shift) for shift in (0.0, 1.0, 2.0))
    first, second = make_rows({"none": plain, "soft": planned}, human, "none", resamples=40, seed=3)
    assert first["differences"] is None and list(second["differences"]) == list(METRICS)
    scores = [DocumentScores(one.per_prompt["words"], np.ones(40, dtype=np.int64)) for one in (planned, plain)]
    delta, interval = paired_bootstrap(*scores, resamples=40, seed=3)
    found = second["differences"]["words"]
    assert found["delta"] == pytest.approx(delta) and found["ci95"] == pytest.approx(interval)
    assert second["metrics"]["latent_perplexity"] == pytest.approx(math.exp(2))
    assert second["differences"]["latent_perplexity"]["ci95"] == pytest.approx([math.exp(2) - math.exp(1)] * 2)
    said = {name: difference["verdict"] for name, difference in second["differences"].items()}
    assert said["rouge2"] == "better" and said["edit_distance"] == "worse" and said["repetition"] == "nearer to human"
    low, high = second["differences"]["mauve"]["ci95"]
    assert low < high
    again = make_rows({"none": plain, "soft": planned}, human, "none", resamples=40, seed=3)
    assert again == [first, second]


def test_few_prompts_have_no_mauve_and_no_intervals():
    generator = np.random.default_rng(0)
    one, other = (continuations(generator, shift, num=5) for shift in (0.0, 1.0))
    row = make_rows({"a": one, "b": other}, other, "b", resamples=50, seed=0)[0]
    assert row["metrics"]["mauve"] is None and row["differences"]["mauve"]["verdict"] == "not measured"
    assert all(difference["ci95"] is None for difference in row["differences"].values())
    assert values(other, None, 0)["mauve"] is None


@pytest.mark.parametrize(
    ("name", "value", "interval", "verdict"),
    [
        ("rouge2", 0.3, (0.05, 0.15), "better"),
        ("rouge2", 0.1, (-0.15, -0.05), "worse"),
        ("edit_distance", 0.1, (-0.15, -0.05), "better"),
        ("words", 0.3, (0.05, 0.15), "nearer to human"),
        ("words", 0.1, (-0.15, -0.05), "farther from human"),
        ("words", 0.9, (0.6, 0.8), "farther from human"),
        ("mauve", 0.3, (-0.05, 0.15), "no measurable difference"),
    ],
)
def test_verdicts(name, value, interval, verdict):
    found = compare(name, value, 0.2, 0.4, interval)
    assert found["verdict"] == verdict and found["delta"] == pytest.approx(value - 0.2)
