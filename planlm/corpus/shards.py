"""The two passes over documents: raw text to encoded shards, and encoded shards to the corpus' files."""

from __future__ import annotations

import itertools
import json
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
from planlm.corpus.store import SPLITS, CorpusWriter
from planlm.corpus.writing import joined, lists, read_arrow, seal, write_sealed
from planlm.distribution import rank, world_size
from planlm.errors import InputError, MachineError
from planlm.pretrained.tokenizer import load_tokenizer
from planlm.progress import Progress
from planlm.terminal import note
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
    note(f"{path}: damaged; kept as {aside.name} and made anew")
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
    spans, ids, tokens = [np.zeros((0, 2), np.int32)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for document in shard:
        found = split_sentences(document.text)
        if len(found) >= max(1, min_sentences):
            document_ids, sentence_tokens = tokenize(tokenizer, document.text, found)
            kept.append(document)
            spans.append(np.array(found, dtype=np.int32))
            ids.append(document_ids)
            tokens.append(sentence_tokens.astype(np.int32))
    counts = np.array([len(found) for found in spans[1:]], dtype=np.int64)  # [documents], sentences
    ends = np.cumsum(counts)
    embeddings = np.empty((int(counts.sum()), encoder.dim), dtype=np.float16)  # [sentences, A]
    sentences = (
        document.text[start:end] for document, found in zip(kept, spans[1:], strict=True) for start, end in found
    )
    done = 0
    for start in range(0, len(embeddings), ENCODED_TOGETHER):
        block = embeddings[start : start + ENCODED_TOGETHER]
        block[:] = encoder.encode(list(itertools.islice(sentences, ENCODED_TOGETHER)))
        if not np.isfinite(block).all():
            reason = "its embeddings are not finite in float16; use another encoder or precision"
            raise InputError(f"{encoder.name}: {reason}")
        ready = int(np.searchsorted(ends, start + len(block), side="right"))
        advance(ready - done)
        done = ready
    advance(len(shard) - done)  # those that are left out
    return pa.table(
        {
            "id": pa.array([document.id for document in kept], pa.string()),
            "text": pa.array([document.text for document in kept], pa.string()),
            "input_ids": lists(np.concatenate(ids), np.array([len(own) for own in ids[1:]], dtype=np.int64)),
            "sentence_spans": lists(np.concatenate(spans), counts),
            "sentence_tokens": lists(np.concatenate(tokens), counts),
            "embeddings": lists(embeddings, counts),
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
            embeddings = joined(read_arrow(path, ["embeddings"])["embeddings"])
            mine = eligible[(eligible >= first) & (eligible < first + len(embeddings))] - first
            sample[at : at + len(mine)] = embeddings[mine]
            first, at = first + len(embeddings), at + len(mine)
        return sample

    def write_corpus(self, writer: CorpusWriter, splits: np.ndarray) -> None:
        """Second pass: give every sentence its action and write the documents.

        Args:
            writer: knows the codebook.
            splits: split of every document, as numbers of `SPLITS`.
        """
        first = 0
        with Progress("Assigning actions", len(splits), "documents") as progress:
            for number, path in enumerate(self._paths):
                if seal(path) is None:
                    raise MachineError(f"{path}: damaged since it was written; run the same command again")
                table = read_arrow(path)
                embeddings = joined(table["embeddings"])
                actions = [
                    assign_actions(embeddings[start : start + ASSIGNED_TOGETHER], writer.codebook)[0]
                    for start in range(0, max(1, len(embeddings)), ASSIGNED_TOGETHER)
                ]
                counts = self.num_sentences[first : first + len(table)]
                table = table.append_column("actions", lists(np.concatenate(actions), counts))
                for split, name in enumerate(SPLITS):
                    own = np.flatnonzero(splits[first : first + len(table)] == split)
                    if len(own):
                        writer.add(name, number, table if len(own) == len(table) else table.take(own))
                first += len(table)
                progress.advance(len(table))
