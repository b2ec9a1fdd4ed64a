"""The two passes over documents: raw text to encoded shards, and encoded shards to the corpus' files."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from transformers import PreTrainedTokenizerFast

from planlm.config import PrepareConfig
from planlm.corpus.codebook import assign_actions
from planlm.corpus.readers import Document
from planlm.corpus.sources import Documents, id_hash
from planlm.corpus.store import SPLIT_NAMES, SPLITS, document_features
from planlm.corpus.writing import lists, read_arrow, seal, write_arrow, write_json, write_sealed, write_split_files
from planlm.distribution import rank, world_size
from planlm.errors import InputError, MachineError
from planlm.pretrained.tokenizer import load_tokenizer
from planlm.progress import Progress
from planlm.text.alignment import tokenize
from planlm.text.encoder import SentenceEncoder
from planlm.text.sentences import split_sentences

SHARD_CHARACTERS = 16_000_000
"""A shard ends here too: 1,000 usual documents have 4 million characters, 1,000 books would not fit in memory."""

ASSIGNED_TOGETHER = 1 << 16
"""Sentences whose actions are looked up at a time: they are widened to float32 for it."""

ENCODED_TOGETHER = 2048
"""Sentences sorted by length at a time: enough for batches without padding, few enough for progress every seconds."""


def encode_shards(documents: Documents, folder: Path, config: PrepareConfig, settings: dict[str, Any]) -> list[Path]:
    """First pass: split, tokenise and embed, one shard at a time; sound shards already in `folder` are not redone.

    Of several processes each makes its share, and all return all paths.

    Args:
        documents: all of them, scanned.
        folder: where shards are written.
        config: the command's.
        settings: what shards depend on; a shard says from which settings and documents it was made.

    Returns:
        Arrow files with the columns of `document_features` except actions; only documents with enough sentences.
    """
    assert documents.hashes is not None
    # Loading takes seconds, which a call that finds every shard done need not spend.
    tools: tuple[PreTrainedTokenizerFast, SentenceEncoder] | None = None
    paths: list[Path] = []
    first = 0
    with Progress("Preparing", len(documents.hashes), "documents") as progress:
        for shard in _grouped(documents, config.shard_documents):
            number, path = len(paths), folder / f"shard-{len(paths):05d}.arrow"
            paths.append(path)
            digest = xxhash.xxh3_128(json.dumps(settings).encode())
            digest.update(documents.hashes[first : first + len(shard)].tobytes())
            identity = digest.hexdigest()
            first += len(shard)
            if number % world_size() != rank() or _is_done(path, identity):
                progress.advance(len(shard))
                continue
            if tools is None:
                tools = load_tokenizer(config.tokenizer), SentenceEncoder(config.encoder, precision=config.precision)
            table = _encoded(shard, *tools, config.min_sentences, progress.advance)
            write_sealed(path, table, identity)
    return paths


def _is_done(path: Path, identity: str) -> bool:
    """Whether a shard is there and sound; one that is not is set aside, to be made anew."""
    if not path.exists():
        return False
    if seal(path) == identity:
        return True
    aside = path.with_suffix(".damaged")
    path.replace(aside)
    print(f"{path}: damaged; kept as {aside.name} and made anew", file=sys.stderr, flush=True)
    return False


def _grouped(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Shards: a function of the documents alone, so that a resumed preparation finds the same ones."""
    shard: list[Document] = []
    characters = 0
    for document in documents:
        shard.append(document)
        characters += len(document.text)
        if len(shard) == size or characters >= SHARD_CHARACTERS:
            yield shard
            shard, characters = [], 0
    if shard:
        yield shard


def _encoded(
    shard: list[Document],
    tokenizer: PreTrainedTokenizerFast,
    encoder: SentenceEncoder,
    min_sentences: int,
    advance: Callable[[int], None],
) -> pa.Table:
    kept: list[Document] = []
    spans, ids, counts = [np.zeros((0, 2), np.int32)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for document in shard:
        found = split_sentences(document.text)
        if len(found) >= max(1, min_sentences):
            document_ids, sentence_tokens = tokenize(tokenizer, document.text, found)
            kept.append(document)
            spans.append(np.array(found, dtype=np.int32))
            ids.append(document_ids)
            counts.append(sentence_tokens.astype(np.int32))
    num_sentences = np.array([len(found) for found in spans[1:]], dtype=np.int64)
    ends = np.cumsum(num_sentences)
    rows = np.empty((int(num_sentences.sum()), encoder.dim), dtype=np.float16)  # [sentences of the shard, A]
    sentences = (
        document.text[start:end] for document, found in zip(kept, spans[1:], strict=True) for start, end in found
    )
    done = 0
    for start in range(0, len(rows), ENCODED_TOGETHER):
        batch = list(itertools.islice(sentences, ENCODED_TOGETHER))
        rows[start : start + len(batch)] = encoder.encode(batch)
        if not np.isfinite(rows[start : start + len(batch)]).all():
            raise InputError(
                f"{encoder.name}: its embeddings are not finite in float16; use another encoder or precision"
            )
        ready = int(np.searchsorted(ends, start + len(batch), side="right"))
        advance(ready - done)
        done = ready
    advance(len(shard) - done)  # those that are left out
    return pa.table(
        {
            "id": pa.array([document.id for document in kept], pa.string()),
            "text": pa.array([document.text for document in kept], pa.string()),
            "input_ids": lists(np.concatenate(ids), np.array([len(row) for row in ids[1:]], dtype=np.int64)),
            "sentence_spans": lists(np.concatenate(spans), num_sentences),
            "sentence_tokens": lists(np.concatenate(counts), num_sentences),
            "embeddings": lists(rows, num_sentences),
        }
    )


class EncodedShards:
    """What the first pass left on disk, read one shard at a time.

    Attributes:
        hashes: of the documents' ids, uint64 [documents].
        num_sentences: int64 [documents].
        action_dim: A.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        hashes, counts = [], []
        for path in paths:
            table = read_arrow(path, ["id", "sentence_tokens", "embeddings"])
            hashes += [id_hash(document_id) for document_id in table["id"].to_pylist()]
            counts.append(pa.compute.list_value_length(table["sentence_tokens"]).to_numpy())
            self.action_dim: int = table.schema.field("embeddings").type.value_type.list_size
        self.hashes = np.array(hashes, dtype=np.uint64)
        self.num_sentences = np.concatenate(counts).astype(np.int64)

    def sample_embeddings(self, documents: np.ndarray, size: int, seed: int) -> np.ndarray:
        """A random sample of the sentences of some documents.

        Args:
            documents: bool [documents].
            size: sentences at most.
            seed: of the choice.

        Returns:
            float32 [min(size, their sentences), A], in the corpus' order.
        """
        eligible = np.flatnonzero(np.repeat(documents, self.num_sentences))
        if len(eligible) > size:
            eligible = np.sort(np.random.default_rng(seed).choice(eligible, size, replace=False))
        sample = np.empty((len(eligible), self.action_dim), dtype=np.float32)
        first = at = 0
        for path in self._paths:
            rows = _embeddings(read_arrow(path, ["embeddings"]))
            mine = eligible[(eligible >= first) & (eligible < first + len(rows))] - first
            sample[at : at + len(mine)] = rows[mine]
            first, at = first + len(rows), at + len(mine)
        return sample

    def write_corpus(self, out: Path, splits: np.ndarray, codebook: np.ndarray) -> dict[str, dict[str, int]]:
        """Second pass: give every sentence its action and write the splits' files.

        Args:
            out: folder of the corpus.
            splits: split of every document, as numbers of `SPLITS`.
            codebook: float32 [K, A].

        Returns:
            Documents, sentences and tokens of every split.
        """
        features = document_features(self.action_dim)
        files: dict[str, list[str]] = {name: [] for name in SPLITS}
        totals = {name: {"documents": 0, "sentences": 0, "tokens": 0} for name in SPLITS}
        for name in SPLITS:  # what an interrupted call with other shares may have left
            shutil.rmtree(out / name, ignore_errors=True)
        first = 0
        with Progress("Assigning actions", len(splits), "documents") as progress:
            for number, path in enumerate(self._paths):
                if seal(path) is None:
                    raise MachineError(f"{path}: damaged since it was written; run the same command again")
                table = read_arrow(path)
                counts = self.num_sentences[first : first + len(table)]
                rows = _embeddings(table)
                actions = [
                    assign_actions(rows[start : start + ASSIGNED_TOGETHER], codebook)[0]
                    for start in range(0, max(1, len(rows)), ASSIGNED_TOGETHER)
                ]
                table = table.append_column("actions", lists(np.concatenate(actions), counts))
                table = table.cast(features.arrow_schema)
                for split, name in enumerate(SPLITS):
                    own = np.flatnonzero(splits[first : first + len(table)] == split)
                    if not len(own):
                        continue
                    (out / name).mkdir(exist_ok=True)
                    files[name].append(f"data-{number:05d}.arrow")
                    part = table if len(own) == len(table) else table.take(own)
                    write_arrow(out / name / files[name][-1], part)
                    totals[name]["documents"] += len(own)
                    totals[name]["sentences"] += int(counts[own].sum())
                    totals[name]["tokens"] += len(part["input_ids"].combine_chunks().flatten())
                first += len(table)
                progress.advance(len(table))
        present = [name for name in SPLITS if files[name]]
        for name in present:
            write_split_files(out / name, name, files[name], features)
        write_json(out / SPLIT_NAMES, {"splits": present})
        return totals


def _embeddings(table: pa.Table) -> np.ndarray:
    """All sentences' embeddings of a table, float16 [sentences, A], without a copy."""
    values = table["embeddings"].combine_chunks().flatten()
    return values.flatten().to_numpy().reshape(len(values), values.type.list_size)
