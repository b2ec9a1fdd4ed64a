"""A planted corpus: sentence types in a fixed order that no short window shows, and an encoder that sees the type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import planlm.corpus.shards as shards
from planlm.config import PrepareConfig
from planlm.corpus.prepare import prepare

TYPES = ["Rain", "Boat", "Mill", "Wool"]
ORDER = [0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3]
"""Every type is followed by several others; only the place in the order tells which."""


class TypeEncoder:
    """Embeds a sentence as its type's corner, moved a little by its words."""

    def __init__(self, name: str = "types", *, precision: str = "fp32") -> None:
        self.dim, self.name, self.precision = 32, name, "fp32"

    def encode(self, sentences: list[str], progress: object = None) -> np.ndarray:
        rows = np.zeros((len(sentences), self.dim), dtype=np.float32)
        for row, sentence in zip(rows, sentences, strict=True):
            row[TYPES.index(sentence.split()[0])] = 1.0
            row[4:] = 0.01 * (sum(map(ord, sentence)) % 7 - 3)
        return rows


def planted_text(document: int) -> str:
    """24 sentences of four words; the order of types is the same in every document, the words differ."""
    random = np.random.default_rng(document)
    sentences = []
    for number in range(24):
        kind = TYPES[ORDER[number % len(ORDER)]]
        words = [f"{kind.lower()}{random.integers(3)}" for _ in range(2)]
        sentences.append(f"{kind} {' '.join(words)}.")
    return " ".join(sentences)


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of the planted `corpus` and of the `lm`, a tiny random GPT-2 with a tokenizer for it."""
    folder: Path = tmp_path_factory.mktemp("planted")
    texts = [planted_text(document) for document in range(80)]
    (folder / "texts").mkdir()
    for document, text in enumerate(texts):
        (folder / "texts" / f"{document:03}.txt").write_text(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    fast.save_pretrained(folder / "lm")
    torch.manual_seed(0)
    shape = {"vocab_size": len(fast), "bos_token_id": 0, "eos_token_id": 0}
    lm = GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shape
        )
    )
    lm.save_pretrained(folder / "lm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SentenceEncoder", TypeEncoder)
        prepare(
            PrepareConfig(
                inputs=(str(folder / "texts"),), out=str(folder / "corpus"), tokenizer=str(folder / "lm"), actions=4,
                encoder="types", validation_fraction=0.1, test_fraction=0.1,
            )
        )  # fmt: skip
    return {"corpus": str(folder / "corpus"), "lm": str(folder / "lm")}


@pytest.fixture(scope="session")
def of_one_token(planted: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared corpus of the same tokenizer whose documents have a token each: there is nothing to predict."""
    folder: Path = tmp_path_factory.mktemp("of_one_token")
    (folder / "texts").mkdir()
    for document in range(40):
        (folder / "texts" / f"{document:03}.txt").write_text(TYPES[document % 2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SentenceEncoder", TypeEncoder)
        prepare(
            PrepareConfig(
                inputs=(str(folder / "texts"),), out=str(folder / "corpus"), tokenizer=planted["lm"], actions=2,
                encoder="types", validation_fraction=0.2, test_fraction=0.2, min_sentences=1,
            )
        )  # fmt: skip
    return str(folder / "corpus")
