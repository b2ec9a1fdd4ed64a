"""A small corpus that needs no weights: a hashing encoder and a tiny tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planlm.config import PrepareConfig

WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"]


def document(number: int) -> str:
    """A short text, different for every number: 2 to 6 sentences in one or two lines."""
    sentences = [
        f"The {WORDS[(number * 7 + i * 3) % len(WORDS)]} number {number} met the {WORDS[(number + i) % len(WORDS)]}."
        for i in range(2 + number % 5)
    ]
    return " ".join(sentences[:3]) + "\n" + " ".join(sentences[3:])


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON lines and returns the file's name."""

    def write(rows: list[Any], name: str = "documents.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def sixty(jsonl: Callable[..., str]) -> str:
    """A file of 60 short documents."""
    return jsonl([{"id": number, "text": document(number)} for number in range(60)])


@pytest.fixture
def settings(
    tmp_path: Path, lm_folder: Callable[[str], str], encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., PrepareConfig]:
    """Configurations with the tiny tokenizer and, in place of any encoder, the hashing one."""
    monkeypatch.setattr("planlm.corpus.shards.SentenceEncoder", lambda name, precision: encoder)

    def make(*inputs: str, **options: Any) -> PrepareConfig:
        options = {"out": str(tmp_path / "corpus"), "encoder": "hash", "tokenizer": lm_folder("llama")} | options
        return PrepareConfig(inputs=inputs, **options)

    return make


@pytest.fixture
def document_text() -> Callable[[int], str]:
    """The texts that `sixty` holds, by number."""
    return document
