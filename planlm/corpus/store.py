"""A prepared corpus on disk: its files, their columns, and how it is opened.

corpus.json            the manifest, written last: a folder without it is not a corpus yet
codebook.safetensors   action embeddings, float32 [K, A]
dataset_dict.json, train/, validation/, test/
                       Arrow files in the layout of `datasets.load_from_disk`, one row a document
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Features, List, Value
from safetensors.torch import load_file
from torch import Tensor

from planlm.corpus.writing import checksum
from planlm.errors import InputError

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
MANIFEST, CODEBOOK = "corpus.json", "codebook.safetensors"


def document_features(action_dim: int) -> Features:
    """Columns of a document with n sentences and t tokens; embeddings are float16 [n, action_dim]."""
    return Features(
        {
            "id": Value("string"),
            "text": Value("string"),
            "input_ids": List(Value("int32")),  # [t]
            "sentence_spans": List(List(Value("int32"), length=2)),  # [n, 2] characters, start and end
            "sentence_tokens": List(Value("int32")),  # [n], adds up to t
            "embeddings": List(List(Value("float16"), length=action_dim)),  # [n, A]
            "actions": List(Value("int32")),  # [n]
        }
    )


@dataclass(frozen=True)
class Manifest:
    """What `corpus.json` says.

    Attributes:
        format_version: of the files; another one is refused.
        num_actions: K.
        action_dim: A, the width of sentence embeddings and codebook.
        encoder, tokenizer: names as given to `prepare`.
        tokenizer_fingerprint: of the rules that made the ids; an LM must have the same.
        has_start_token: whether the tokenizer puts a token before every document.
        splits: documents, sentences and tokens of every split.
        left_out: documents with fewer than the asked for number of sentences.
        seed: of k-means and its sample.
        sources: input, number of documents and fingerprint of their ids and texts, one for each input.
        settings: the options that decide the corpus, as resolved.
        versions: of the packages that made it.
    """

    format_version: int
    num_actions: int
    action_dim: int
    encoder: str
    tokenizer: str
    tokenizer_fingerprint: str
    has_start_token: bool
    splits: dict[str, dict[str, int]]
    left_out: int
    seed: int
    sources: list[dict[str, Any]]
    settings: dict[str, Any]
    versions: dict[str, str]

    def to_json(self) -> str:
        """The text of `corpus.json`."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ValueError, TypeError or KeyError where `text` is no manifest of this format version."""
        fields = json.loads(text)
        if fields["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {fields['format_version']}, this PlanLM reads {FORMAT_VERSION}")
        return cls(**fields)


class PreparedCorpus:
    """A prepared corpus, opened for reading; documents are memory-mapped.

    Attributes:
        path: its folder.
        manifest: what it was made from.
        codebook: action embeddings, float32 [K, A].
    """

    def __init__(self, path: Path, manifest: Manifest, codebook: Tensor, documents: datasets.DatasetDict) -> None:
        self.path, self.manifest, self.codebook, self._documents = path, manifest, codebook, documents

    @classmethod
    def load(cls, path: str | Path) -> PreparedCorpus:
        """Open the corpus in folder `path`.

        Raises:
            InputError: there is none, its preparation has not finished, or another version of PlanLM made it.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            if (path / "partial").is_dir():
                raise InputError(f"{path}: its preparation has not finished; run the same `planlm prepare` again")
            raise InputError(f"{path}: no prepared corpus (no {MANIFEST}); make one with `planlm prepare`")
        try:
            manifest = Manifest.from_json((path / MANIFEST).read_text(encoding="utf-8"))
            codebook = load_file(path / CODEBOOK)["codebook"]
            documents = datasets.load_from_disk(str(path), keep_in_memory=False)
        except Exception as error:  # a damaged file shows in many ways: JSON, Arrow and safetensors have their own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: cannot be read as a prepared corpus ({reason}); prepare it again") from error
        return cls(path, manifest, codebook, documents)

    def split(self, name: str) -> datasets.Dataset:
        """Documents of the split `name`, with the columns of `document_features`.

        Raises:
            InputError: the corpus has no such split or no document in it.
        """
        if name not in self._documents or not len(self._documents[name]):
            have = ", ".join(split for split, counts in self.manifest.splits.items() if counts["documents"])
            raise InputError(f"{self.path}: no documents in split {name!r}; it has {have}")
        return self._documents[name]

    @cached_property
    def fingerprint(self) -> str:
        """What decides training on this corpus, as 64 hexadecimal digits: sha256 of codebook, documents and tokenizer.

        The same for a copy elsewhere, under another name or with other times of its files.
        """
        files = sorted([self.path / CODEBOOK, *self.path.glob("*/*.arrow")])
        contents = {file.relative_to(self.path).as_posix(): checksum(file) for file in files}
        identity = {"tokenizer": self.manifest.tokenizer_fingerprint, "files": contents}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @cached_property
    def action_counts(self) -> Tensor:
        """How many training sentences have each action, int64 [K]: the unigram baseline."""
        counts = np.zeros(self.manifest.num_actions, dtype=np.int64)
        rows = self.split("train").with_format("arrow", columns=["actions"])
        for table in rows.iter(1000):
            actions = np.concatenate([chunk.flatten().to_numpy() for chunk in table["actions"].chunks])
            counts += np.bincount(actions, minlength=len(counts))
        return torch.from_numpy(counts)
