"""A prepared corpus on disk: its files, their columns, and how it is opened.

corpus.json            the manifest, written last: a folder without it is not a corpus yet
codebook.safetensors   action embeddings, float32 [K, A]
dataset_dict.json, train/, validation/, test/
                       Arrow files in the layout of `datasets.load_from_disk`, one row a document
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import datasets
import numpy as np
import pyarrow as pa
import torch
import xxhash
from datasets import Features, List, Value
from safetensors.torch import save
from torch import Tensor

from planlm.corpus.verify import verify_folder, verify_split
from planlm.corpus.writing import joined, sizes, write_arrow
from planlm.errors import InputError
from planlm.files import checksum, replacing, write_json, write_text

FORMAT_VERSION = 2
SPLITS = ("train", "validation", "test")
MANIFEST, CODEBOOK, SPLIT_NAMES = "corpus.json", "codebook.safetensors", "dataset_dict.json"


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


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `corpus.json` says.

    Attributes:
        format_version: of the files; another one is refused.
        num_actions: K.
        action_dim: A, the width of sentence embeddings and codebook.
        encoder, tokenizer: names as given to `prepare`; of folders the whole path.
        tokenizer_fingerprint: of the rules that made the ids; an LM must have the same.
        vocabulary: one more than the largest id that the tokenizer can give.
        has_start_token: whether the tokenizer puts a token before every document.
        splits: documents, sentences and tokens of every split.
        left_out: documents with fewer than the asked for number of sentences.
        seed: of k-means and its sample.
        sources: of each input the argument, number of documents, a fingerprint of their ids and texts, and the number
            of files that were left aside.
        settings: the options that decide the corpus, as resolved.
        versions: of the packages that made it.
        files: size in bytes and XXH3 checksum of every other file of the corpus.
    """

    format_version: int = FORMAT_VERSION
    num_actions: int
    action_dim: int
    encoder: str
    tokenizer: str
    tokenizer_fingerprint: str
    vocabulary: int
    has_start_token: bool
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    left_out: int
    seed: int
    sources: list[dict[str, Any]]
    settings: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, tuple[int, str]] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of `corpus.json`: the fields and, last, a checksum of them."""
        content = asdict(self)
        content["checksum"] = xxhash.xxh3_128_hexdigest(json.dumps(content).encode())
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ValueError, TypeError or KeyError where `text` is not, byte for byte, what `to_json` wrote."""
        content = json.loads(text)
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"format {content['format_version']!s:.9}, not {FORMAT_VERSION}; format 1 had no checksums"
            )
        checksum = content.pop("checksum")
        manifest = cls(**content)
        for name, hint in get_type_hints(cls).items():
            if type(getattr(manifest, name)) is not (get_origin(hint) or hint):
                raise TypeError(f"{name} in {MANIFEST} is {getattr(manifest, name)!r:.40}")
        for counts in manifest.splits.values():
            if any(type(counts[name]) is not int for name in ("documents", "sentences", "tokens")):
                raise TypeError(f"a split in {MANIFEST} has {counts!r:.40}")
        if manifest.to_json() != text:
            raise ValueError(f"{MANIFEST} was changed after it was written, or its checksum {checksum!s:.40} was")
        return manifest


class CorpusWriter:
    """Writes a corpus: its codebook at once, then documents, a file of them at a time, and its manifest last.

    Args:
        folder: where to; made if need be. Documents that an earlier writer left there go.
        codebook: float32 [K, A].

    Attributes:
        codebook: as given.
        schema: Arrow's, of tables of documents.
        splits: documents, sentences and tokens that were added, by split.
    """

    def __init__(self, folder: Path, codebook: np.ndarray) -> None:
        self._folder, self.codebook = folder, codebook
        self._features = document_features(codebook.shape[1])
        self.schema: pa.Schema = self._features.arrow_schema
        self.splits: dict[str, Counter[str]] = {name: Counter(documents=0, sentences=0, tokens=0) for name in SPLITS}
        folder.mkdir(parents=True, exist_ok=True)
        for name in SPLITS:
            shutil.rmtree(folder / name, ignore_errors=True)
        with replacing(folder / CODEBOOK) as file:
            file.write(save({"codebook": torch.from_numpy(codebook)}))

    def add(self, split: str, number: int, documents: pa.Table) -> None:
        """Write some documents of a split, at least one, to its file with this number; numbers rise."""
        (self._folder / split).mkdir(exist_ok=True)
        write_arrow(self._folder / split / f"data-{number:05d}.arrow", documents.cast(self.schema))
        self.splits[split].update(sizes(documents))

    def finish(self, manifest: Manifest) -> None:
        """Write what `datasets.load_from_disk` opens the splits by, and the manifest with the splits that there are."""
        present = [name for name, counts in self.splits.items() if counts["documents"]]
        for name in present:
            folder = self._folder / name
            files = sorted(file.name for file in folder.glob("*.arrow"))
            contents = "".join(checksum(folder / file) for file in files)
            write_json(folder / "dataset_info.json", {"features": self._features.to_dict()})
            state: dict[str, Any] = {
                "_data_files": [{"filename": file} for file in files],
                # A cache key of datasets'; from the contents, since a random one would change the corpus' bytes.
                "_fingerprint": xxhash.xxh3_64_hexdigest(contents.encode()),
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": name,
            }
            write_json(folder / "state.json", state)
        write_json(self._folder / SPLIT_NAMES, {"splits": present})
        write_manifest(self._folder, replace(manifest, splits={name: dict(self.splits[name]) for name in SPLITS}))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Finish the corpus in `folder`: write its manifest, with the checksums of all that is there."""
    paths = [folder / CODEBOOK, folder / SPLIT_NAMES]
    paths += [file for split in manifest.splits for file in sorted((folder / split).glob("*"))]
    files = {path.relative_to(folder).as_posix(): (path.stat().st_size, checksum(path)) for path in paths}
    write_text(folder / MANIFEST, replace(manifest, files=files).to_json())


class PreparedCorpus:
    """A prepared corpus, opened for reading; documents are memory-mapped.

    Attributes:
        path: its folder.
        manifest: what it was made from.
        codebook: action embeddings, float32 [K, A].
    """

    def __init__(self, path: Path, manifest: Manifest, codebook: Tensor) -> None:
        self.path, self.manifest, self.codebook = path, manifest, codebook
        self._splits: dict[str, datasets.Dataset] = {}

    @classmethod
    def load(cls, path: str | Path) -> PreparedCorpus:
        """Open the corpus in folder `path`. Documents are verified when their split is first asked for.

        Raises:
            InputError: there is none, its preparation has not finished, it is damaged, or another version of PlanLM
                made it.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            if (path / "partial").is_dir():
                raise InputError(f"{path}: its preparation has not finished; run the same `planlm prepare` again")
            raise InputError(f"{path}: no prepared corpus (no {MANIFEST}); make one with `planlm prepare`")
        with _damage(path):
            manifest = Manifest.from_json((path / MANIFEST).read_text(encoding="utf-8"))
            return cls(path, manifest, verify_folder(path, manifest))

    def split(self, name: str) -> datasets.Dataset:
        """Documents of the split `name`, with the columns of `document_features`.

        At first its files are read and held against their checksums.

        Raises:
            InputError: the corpus has no such split or no document in it, or the split is damaged.
        """
        if not self.manifest.splits.get(name, {}).get("documents"):
            have = ", ".join(split for split, counts in self.manifest.splits.items() if counts["documents"])
            advice = "" if name == "train" else f"; `planlm prepare` with --{name}-fraction above 0 makes some"
            raise InputError(f"{self.path}: no documents in split {name!r}; it has {have}{advice}")
        if name not in self._splits:
            with _damage(self.path):
                verify_split(self.path, self.manifest, name, document_features(self.manifest.action_dim).arrow_schema)
                self._splits[name] = datasets.Dataset.load_from_disk(str(self.path / name), keep_in_memory=False)
        return self._splits[name]

    @cached_property
    def fingerprint(self) -> str:
        """What decides training on this corpus, as 64 hexadecimal digits: sha256 of codebook, documents and tokenizer.

        The same for a copy elsewhere, under another name or with other times of its files.
        """
        contents = {
            name: digest for name, (_, digest) in self.manifest.files.items() if name.endswith((CODEBOOK, ".arrow"))
        }
        identity = {"tokenizer": self.manifest.tokenizer_fingerprint, "files": contents}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @cached_property
    def action_counts(self) -> Tensor:
        """How many training sentences have each action, int64 [K]: the unigram baseline."""
        counts = np.zeros(self.manifest.num_actions, dtype=np.int64)
        rows = self.split("train").with_format("arrow", columns=["actions"])
        for table in rows.iter(1000):
            counts += np.bincount(joined(table["actions"]), minlength=len(counts))
        return torch.from_numpy(counts)


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """One line for a damaged corpus, which shows in many ways: JSON, Arrow and safetensors have their own errors."""
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: cannot be read as a prepared corpus ({reason}); take it from a copy, or delete it and prepare it "
            "again"
        ) from error
