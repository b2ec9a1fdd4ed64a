"""Noise that belongs to a text: it draws from the distribution, and texts of a number have each their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig

from planlm.model.sampling import SharedGumbel, gumbel, left_padded, sampled

IDS = torch.zeros(1, 7, dtype=torch.long)


def noise(text: int, samples: int = 1) -> SharedGumbel:
    return SharedGumbel(1, [(text, sample) for sample in range(samples)], 3)


def test_noise_draws_from_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -torch.inf, -1.0]])
    counts = np.zeros(5)
    for text in range(4000):
        counts[int(noise(text)(IDS, logits).argmax())] += 1
    kept = [0, 1, 2, 4]
    assert counts[3] == 0
    assert chisquare(counts[kept], 4000 * logits.double().softmax(-1).numpy()[0, kept]).pvalue > 0.001


def test_samples_of_a_text_have_noise_of_their_own_and_the_first_that_of_a_single_one() -> None:
    scores = torch.zeros(3, 5)
    three = noise(4, samples=3)(IDS.expand(3, -1), scores)
    assert torch.equal(three[0], torch.from_numpy(gumbel((1, 4, 4), 5)))
    assert len({tuple(row) for row in three.tolist()}) == 3


def test_attempts_have_noise_of_their_own_at_the_positions_of_their_text() -> None:
    scores = torch.zeros(4, 5)
    four = SharedGumbel(1, [(4, 0), (4, 1)], 3, written=[6, 0], attempts=[2, 2])(IDS.expand(4, -1), scores)
    assert torch.equal(four[0], torch.from_numpy(gumbel((1, 4, 10), 5)))
    assert torch.equal(four[2], torch.from_numpy(gumbel((1, 4, 4, 1), 5)))
    assert len({tuple(row) for row in four.tolist()}) == 4


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({}, 5), ({"top_h": 0.0001}, 1), ({"min_p": 0.9}, 1), ({"typical_p": 0.05}, 1), ({"epsilon_cutoff": 0.2}, 2),
        ({"eta_cutoff": 0.9}, 1), ({"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}, 5), ({"top_k": 1}, 5),
    ],
)  # fmt: skip
def test_cut_offs_of_the_models_own_settings_are_followed(settings: dict[str, float], allowed: int) -> None:
    """All but top-k, which `generate` switches off."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -0.5, -1.0]])
    scores = sampled(GenerationConfig(**settings), 1.0, 1.0, noise(0))(IDS, logits)
    assert int(scores.isfinite().sum()) == allowed


def test_texts_end_in_the_last_column() -> None:
    ids, mask = left_padded([[5], [6, 7, 8]], 9, torch.device("cpu"))
    assert ids.tolist() == [[9, 9, 5], [6, 7, 8]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
