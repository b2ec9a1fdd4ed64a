"""The codebook: k-means centroids of sentence embeddings (faiss), and the action of a sentence, its nearest one."""

from __future__ import annotations

import faiss
import numpy as np

from planlm.errors import InputError

SENTENCES_PER_ACTION = 39
"""Fewer training sentences per centroid than this are few for k-means, says faiss; the default K keeps to it."""

SAMPLE_PER_ACTION = 256
"""Training sentences per centroid that k-means is fitted on, faiss' default: more hardly moves the centroids."""


def fit_codebook(sample: np.ndarray, num_actions: int, *, iterations: int, seed: int) -> np.ndarray:
    """k-means centroids with no empty cluster, the same whatever the number of threads.

    Args:
        sample: embeddings, float32 [n, A].
        num_actions: K, at most the number of distinct rows.
        iterations: of Lloyd's algorithm.
        seed: of the first centroids, which are rows of `sample`.

    Returns:
        float32 [K, A].

    Raises:
        InputError: fewer distinct rows than K.
    """
    if num_actions > len(sample):
        raise _too_few(sample, num_actions)
    kmeans = faiss.Kmeans(
        sample.shape[1],
        num_actions,
        niter=iterations,
        seed=seed,
        # The papers'. Random rows do as well on Wikipedia (objective within 0.1 % over three seeds), but where
        # sentences are of few plain kinds they often leave two kinds to one centroid.
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        min_points_per_centroid=1,  # faiss would warn on stderr; `prepare` does it in its own words
        max_points_per_centroid=len(sample),
    )
    kmeans.train(sample)
    return _fill_empty(sample, np.array(kmeans.centroids))


def assign_actions(embeddings: np.ndarray, codebook: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest row of the codebook for every embedding.

    Args:
        embeddings: [n, A], of any float type.
        codebook: float32 [K, A].

    Returns:
        actions int32 [n] and squared distances float32 [n].
    """
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook)
    distances, actions = index.search(np.ascontiguousarray(embeddings, dtype=np.float32), 1)
    return actions[:, 0].astype(np.int32), distances[:, 0]


def _fill_empty(sample: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Put centroids that no row is nearest to on the rows farthest from their own, until every one has a row.

    Ends: a row that becomes a centroid keeps it, and each round adds distinct ones.
    """
    while True:
        actions, distances = assign_actions(sample, centroids)
        empty = np.flatnonzero(np.bincount(actions, minlength=len(centroids)) == 0)
        if not len(empty):
            return centroids
        chosen: dict[bytes, int] = {}
        for row in np.argsort(-distances, kind="stable"):
            if len(chosen) == len(empty):
                break
            # Compared exactly: the distance of a row to itself is not always zero in float32.
            if not np.array_equal(sample[row], centroids[actions[row]]):
                chosen.setdefault(sample[row].tobytes(), row)
        if not chosen:
            raise _too_few(sample, len(centroids))
        centroids[empty[: len(chosen)]] = sample[list(chosen.values())]


def _too_few(sample: np.ndarray, num_actions: int) -> InputError:
    distinct = len(np.unique(sample, axis=0))
    return InputError(
        f"--actions {num_actions}: the training sentences have {distinct} distinct embeddings; set --actions to at "
        f"most {distinct}"
    )
