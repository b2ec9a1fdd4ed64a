"""Shared fixtures: seeds, tiny tokenizers and LMs in transformers' folder form, an encoder that needs no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SAMPLE = [
    "The cat sat on the mat. It was warm there. Dr. Smith came in! Was he late? Nobody knew, and nobody asked.",
    "Rain fell on the harbour for three days. Boats stayed in. The café was full of naïve 漢字 readers 🙂 and songs.",
    "In 1905 the town had a mill, a school and a church. Its people traded wool with the U.S. and with Norway.",
]


torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class HashEncoder:
    """A sentence's embedding is a unit vector drawn from a generator seeded with the sentence."""

    def __init__(self, dim: int = 16) -> None:
        self.dim, self.name, self.calls = dim, "hash", 0

    def encode(self, sentences: list[str], progress: object = None) -> np.ndarray:
        self.calls += 1
        rows = np.empty((len(sentences), self.dim), dtype=np.float32)
        for row, sentence in enumerate(sentences):
            seed = int.from_bytes(hashlib.blake2b(sentence.encode(), digest_size=4).digest(), "little")
            rows[row] = np.random.default_rng(seed).standard_normal(self.dim)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def encoder() -> HashEncoder:
    return HashEncoder()


def make_tokenizer(start: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's; with `start`, one that puts a start token before every text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folder of a tiny random LM with its tokenizer, by family: gpt2 (no start token) or llama (with one)."""
    made: dict[str, str] = {}

    def folder(family: str) -> str:
        if family not in made:
            path: Path = tmp_path_factory.mktemp(family)
            tokenizer = make_tokenizer(start=family == "llama")
            torch.manual_seed(0)
            shape = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
            if family == "gpt2":
                lm = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=256, **shape))
            else:
                lm = LlamaForCausalLM(
                    LlamaConfig(
                        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, **shape,
                    )
                )  # fmt: skip
            lm.save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[family] = str(path)
        return made[family]

    return folder
