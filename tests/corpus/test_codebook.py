"""k-means: no empty cluster, the same on any number of threads, clear refusals."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from planlm.corpus.codebook import assign_actions, fit_codebook
from planlm.errors import InputError


def blobs(num_blobs: int, size: int, dim: int = 16, noise: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((num_blobs, dim)) * 5
    rows = np.repeat(centres, size, axis=0) + noise * generator.standard_normal((num_blobs * size, dim))
    return rows.astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_finds_plain_kinds(seed: int) -> None:
    sample = blobs(8, 50, noise=0.1)
    actions, distances = assign_actions(sample, fit_codebook(sample, 8, iterations=20, seed=seed))
    assert distances.mean() < 1  # one centroid for two kinds would leave some 100
    assert actions.dtype == np.int32 and set(actions) == set(range(8))


def test_assignment_is_the_nearest_row() -> None:
    sample, codebook = blobs(8, 50), blobs(5, 3)
    actions, distances = assign_actions(sample.astype(np.float16), codebook)
    exact = np.square(sample.astype(np.float16).astype(np.float64)[:, None] - codebook[None]).sum(axis=-1)
    np.testing.assert_array_equal(actions, exact.argmin(axis=1))
    np.testing.assert_allclose(distances, exact.min(axis=1), rtol=1e-3)


@pytest.mark.parametrize("copies", [1, 7])
@pytest.mark.parametrize("num_actions", [1, 2, 30, 39, 40])
def test_no_cluster_is_empty_up_to_one_action_a_sentence(num_actions: int, copies: int) -> None:
    sample = np.tile(blobs(4, 10), (copies, 1))  # 40 distinct rows
    actions, _ = assign_actions(sample, fit_codebook(sample, num_actions, iterations=20, seed=0))
    assert np.bincount(actions, minlength=num_actions).min() > 0


@pytest.mark.parametrize("copies", [1, 7])
def test_more_actions_than_distinct_sentences_are_refused(copies: int) -> None:
    sample = np.tile(blobs(4, 10), (copies, 1))
    with pytest.raises(InputError, match=r"--actions 41: .* 40 distinct embeddings; set --actions to at most 40"):
        fit_codebook(sample, 41, iterations=20, seed=0)


def test_same_bytes_on_one_thread_and_two() -> None:
    sample = blobs(20, 200, dim=64)
    before = faiss.omp_get_max_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            faiss.omp_set_num_threads(threads)
            codebook = fit_codebook(sample, 50, iterations=20, seed=3)
            results.append((codebook.tobytes(), assign_actions(sample, codebook)[0].tobytes()))
    finally:
        faiss.omp_set_num_threads(before)
    assert results[0] == results[1] == results[2]
    assert fit_codebook(sample, 50, iterations=20, seed=4).tobytes() != results[0][0]


def test_faiss_does_not_print(capfd: pytest.CaptureFixture[str]) -> None:
    sample = blobs(4, 10)
    fit_codebook(sample, 30, iterations=5, seed=0)
    fit_codebook(sample, 40, iterations=5, seed=0)
    assert capfd.readouterr() == ("", "")
