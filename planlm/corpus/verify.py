"""Whether the files of a corpus are what was written, and fit each other.

Small files are read whenever a corpus is opened, its documents once in each process, before the first is used: a
checksum costs less than waiting for the disk. Their contents are checked besides, since a corpus may come from anybody.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import load_file
from torch import Tensor

from planlm.corpus.writing import joined, read_arrow, sizes
from planlm.files import checksum
from planlm.progress import Progress

if TYPE_CHECKING:
    from planlm.corpus.store import Manifest

READERS = 4
"""Files verified at a time: enough for a disk to be busy."""


def verify_folder(folder: Path, manifest: Manifest) -> Tensor:
    """Check all but the documents.

    Returns:
        The codebook, float32 [K, A].

    Raises:
        ValueError, OSError: a file is missing or damaged, or the codebook does not fit the manifest.
    """
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        if ".." in Path(name).parts or path.stat().st_size != size:
            raise ValueError(f"{name} has {path.stat().st_size} bytes in place of {size}")
        if path.suffix != ".arrow" and checksum(path) != digest:
            raise ValueError(f"{name} is damaged")
    if "codebook.safetensors" not in manifest.files:
        raise ValueError("its manifest lists no codebook")
    codebook = load_file(folder / "codebook.safetensors")["codebook"]
    if codebook.shape != (manifest.num_actions, manifest.action_dim) or codebook.dtype != torch.float32:
        raise ValueError("its codebook is not of the size that its manifest says")
    if not codebook.isfinite().all():
        raise ValueError("its codebook is not finite")
    return codebook


def verify_split(folder: Path, manifest: Manifest, name: str, schema: pa.Schema) -> None:
    """Check every document of a split.

    Raises:
        ValueError, OSError, pa.ArrowException: a file is damaged, or does not fit the manifest.
    """
    files = [file for file in manifest.files if file.startswith(f"{name}/") and file.endswith(".arrow")]
    state = json.loads((folder / name / "state.json").read_text(encoding="utf-8"))
    if [f"{name}/{file['filename']}" for file in state["_data_files"]] != files:
        raise ValueError(f"{name}/state.json names other files than the manifest")
    limits = (manifest.num_actions, manifest.vocabulary)
    with ThreadPoolExecutor(READERS) as pool, Progress("Verifying", len(files), "files") as progress:

        def verified(file: str) -> Counter[str]:
            status = os.stat(folder / file)
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            return _shard(str((folder / file).resolve()), stamp, manifest.files[file][1], limits, schema)

        totals: Counter[str] = Counter()
        for counts in pool.map(verified, files):
            totals.update(counts)
            progress.advance()
    if totals != manifest.splits[name]:
        raise ValueError(f"{name} does not hold the documents, sentences and tokens that the manifest says")


@functools.cache
def _shard(path: str, stamp: tuple[int, ...], digest: str, limits: tuple[int, int], schema: pa.Schema) -> Counter[str]:
    """Check one file, once as long as its `stamp` stays; its documents, sentences and tokens."""
    if checksum(Path(path)) != digest:
        raise ValueError(f"{path} is damaged")
    table = read_arrow(Path(path))
    if not table.schema.equals(schema):
        raise ValueError(f"{path} has other columns than a corpus")
    table.validate(full=True)
    totals: Counter[str] = Counter()
    for batch in table.to_batches():
        if problem := _problem(batch, *limits):
            raise ValueError(f"{path}: {problem}")
        totals.update(sizes(batch))
    return totals


def _problem(batch: pa.RecordBatch, num_actions: int, vocabulary: int) -> str | None:
    """What is wrong with some documents whose buffers are sound."""
    columns = {name: batch.column(name) for name in batch.schema.names}
    flat = {name: column.flatten() for name, column in columns.items() if pa.types.is_list(column.type)}
    inner = [values.flatten() for values in flat.values() if pa.types.is_fixed_size_list(values.type)]
    if any(array.null_count for array in [*columns.values(), *flat.values(), *inner]):
        return "a value is missing"
    lengths = {name: pc.list_value_length(columns[name]).to_numpy(zero_copy_only=False) for name in flat}
    count = lengths["actions"]  # [documents], sentences
    if not len(count):
        return None
    if count.min() < 1 or any(
        not np.array_equal(count, lengths[name]) for name in ("sentence_spans", "sentence_tokens", "embeddings")
    ):
        return "columns have different numbers of sentences"
    actions, tokens, ids, spans = (
        joined(columns[name]) for name in ("actions", "sentence_tokens", "input_ids", "sentence_spans")
    )
    first = np.cumsum(count) - count
    if tokens.min() < 0 or not np.array_equal(np.add.reduceat(tokens, first, dtype=np.int64), lengths["input_ids"]):
        return "the tokens of sentences do not add up to those of the document"
    if actions.min() < 0 or actions.max() >= num_actions:
        return "an action is out of range"
    if len(ids) and (ids.min() < 0 or ids.max() >= vocabulary):
        return "a token is out of range"
    limit = np.repeat(pc.utf8_length(columns["text"]).to_numpy(zero_copy_only=False), count)
    before = np.concatenate([[0], spans[:-1, 1]])
    before[first] = 0
    if (spans[:, 0] < before).any() or (spans[:, 1] <= spans[:, 0]).any() or (spans[:, 1] > limit).any():
        return "a sentence is out of its text"
    return None
