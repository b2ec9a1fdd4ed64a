"""`planlm prepare`: raw text to a prepared corpus, resumable at any moment.

Everything is read once to find faults and to fingerprint it; then documents are split, tokenised and embedded shard by
shard into OUT/partial; the codebook is fitted on training sentences; and the corpus' files are written, its manifest
last. What is in OUT/partial belongs to the settings and sources in its arguments.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from planlm.config import PrepareConfig
from planlm.corpus.actions import label_actions
from planlm.corpus.codebook import SAMPLE_PER_ACTION, SENTENCES_PER_ACTION, fit_codebook
from planlm.corpus.inputs import find_inputs, in_memory
from planlm.corpus.readers import Fields
from planlm.corpus.shards import EncodedShards, encode_shards
from planlm.corpus.sources import Documents
from planlm.corpus.splits import assign_splits
from planlm.corpus.store import CODEBOOK, MANIFEST, SPLITS, CorpusWriter, Manifest, PreparedCorpus
from planlm.corpus.writing import storage_errors
from planlm.distribution import any_rank, barrier, on_rank_zero
from planlm.errors import InputError
from planlm.files import beside_result, check_own, checksum, locked, read_json, write_json
from planlm.precision import compute_dtype, device
from planlm.pretrained.names import Kind, absolute, resolve
from planlm.pretrained.tokenizer import load_tokenizer, tokenizer_fingerprint
from planlm.terminal import note
from planlm.text.alignment import start_tokens
from planlm.text.encoder import encoder_fingerprint

DEFAULT_ACTIONS = 1024
"""K of the papers."""

PARTIAL = "partial"
"""Folder of an unfinished preparation."""

RECORD = "arguments.json"
"""In it, what the preparation was asked for."""

ENCODING = ("encoder_fingerprint", "tokenizer_fingerprint", "precision", "min_sentences", "shard_documents")
"""Settings that the shards in OUT/partial depend on."""

ASSEMBLY = ("actions", "codebook_fingerprint", "validation_fraction", "test_fraction", "kmeans_iterations", "seed")
"""Settings that only what is made from the shards depends on: they may change before the corpus is finished."""

PACKAGES = ("planlm", "torch", "transformers", "sentence-transformers", "datasets", "faiss-cpu", "syntok", "pyarrow")


def prepare(config: PrepareConfig, texts: Iterable[str | Mapping[str, Any]] | None = None) -> PreparedCorpus:
    """Prepare a corpus, or go on with one that was interrupted; a finished one of the same kind is returned as it is.

    The same settings and sources give the same bytes. Under torchrun the processes share the shards.

    Args:
        config: the command's.
        texts: see `planlm.prepare`; in place of the files of `config.inputs`, which is their name then.

    Raises:
        InputError: faulty input or settings, or an `out` that holds something else.
        MachineError: the disk is full; what is finished stays, and the same call goes on from there.
    """
    if config.validation_fraction + config.test_fraction >= 1:
        raise InputError(
            f"--validation-fraction {config.validation_fraction} and --test-fraction {config.test_fraction}: together "
            "they must leave some documents for training"
        )
    # What can be refused at once comes before the tokenizer, which may have to be converted, and before all reading.
    inputs = find_inputs(config.inputs) if texts is None else [in_memory(config.inputs[0], texts)]
    documents = Documents(inputs, Fields(config.text_field, config.id_field), config.max_documents)
    out = Path(config.out)
    _check_place(out)
    # The corpus names its encoder and tokenizer to later commands, which may run in another folder.
    config = dataclasses.replace(
        config, encoder=_located(config.encoder, "encoder"), tokenizer=_located(config.tokenizer, "lm")
    )
    given = _given_codebook(config)
    tokenizer = load_tokenizer(config.tokenizer)
    arguments: dict[str, Any] = {
        "settings": _settings(config, tokenizer_fingerprint(tokenizer), given),
        "sources": [dataclasses.asdict(source) for source in documents.scan()],
    }
    for line in documents.left_aside():
        note(line)
    with storage_errors(out), contextlib.ExitStack() as held:
        # Whether shards are to be made; rank 0 asks, holds the folder and finishes the corpus.
        is_new = on_rank_zero(lambda: _begin(out, arguments, held))
        if any_rank(bool(is_new)):
            settings = {name: arguments["settings"][name] for name in ENCODING}
            paths = encode_shards(documents, out / PARTIAL, config, settings)
            barrier()
            on_rank_zero(lambda: _finish(out, paths, arguments, tokenizer, config, given))
    corpus = PreparedCorpus.load(out)
    with beside_result(out):
        on_rank_zero(lambda: label_actions(corpus, given))
    return corpus


def _check_place(out: Path) -> None:
    """Refuse at once an `out` that cannot be used."""
    check_own(out)
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir():
        raise InputError(f"{out}: cannot be written (Not a directory: {above}); give another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{out}: cannot be written (Permission denied: {above}); give another --out")
    if out.exists() and not (out / MANIFEST).exists() and not (out / PARTIAL / RECORD).exists():
        # All that is there before the record is.
        ours = {PARTIAL, "lock"}
        if any(file.name not in ours and not file.name.startswith(".planlm-") for file in out.rglob("*")):
            raise InputError(f"{out}: holds other files; give another --out")


def _begin(out: Path, arguments: dict[str, Any], held: contextlib.ExitStack) -> bool:
    """Claim `out` for as long as `held` is; False where it holds the corpus asked for already."""
    if (out / MANIFEST).exists():
        corpus = PreparedCorpus.load(out)
        found = {"settings": corpus.manifest.settings, "sources": corpus.manifest.sources}
        if differences := _differences(found, arguments, ENCODING + ASSEMBLY):
            raise InputError(f"{out}: holds another prepared corpus ({differences}); give another --out")
        shutil.rmtree(out / PARTIAL, ignore_errors=True)  # left where a call was killed after writing the manifest
        note(f"{out} is prepared already, from the same documents and with the same settings")
        return False
    partial = out / PARTIAL
    partial.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(locked(partial / "lock"))
    except BlockingIOError:
        raise InputError(f"{out}: another `planlm prepare` is at work there; wait, or give another --out") from None
    held.callback(lambda: None if _has_shards(out) else _discard(out))
    if (partial / RECORD).exists():
        differences = _recorded_differences(partial / RECORD, arguments)
        if differences and _has_shards(out):
            raise InputError(
                f"{out}: holds an unfinished preparation of another kind ({differences}); go on with its settings, "
                "delete it, or give another --out"
            )
        note(f"going on with the preparation in {out}")
    write_json(partial / RECORD, arguments)
    return True


def _recorded_differences(record: Path, arguments: dict[str, Any]) -> str:
    """From what a preparation was asked for; none where that is damaged, since shards say what they were made from."""
    with contextlib.suppress(InputError, LookupError, TypeError, AttributeError):
        return _differences(read_json(record), arguments, ENCODING)
    return ""


def _has_shards(out: Path) -> bool:
    return any((out / PARTIAL).glob("shard-*.arrow"))


def _discard(out: Path) -> None:
    """Remove a preparation with nothing in it to go on with."""
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    with contextlib.suppress(OSError):
        out.rmdir()


def _finish(
    out: Path,
    paths: list[Path],
    arguments: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    config: PrepareConfig,
    given: PreparedCorpus | None,
) -> None:
    """From shards to the corpus' files, the manifest last."""
    shards = EncodedShards(paths)
    total = sum(source["documents"] for source in arguments["sources"])
    try:
        splits = _splits(shards, total, config)
    except InputError:  # three documents at most are kept: nothing to go on with after the settings are mended
        _discard(out)
        raise
    codebook = _codebook(shards, splits == SPLITS.index("train"), config) if given is None else given.codebook.numpy()
    writer = CorpusWriter(out, codebook)
    shards.write_corpus(writer, splits)
    manifest = Manifest(
        num_actions=codebook.shape[0],
        action_dim=codebook.shape[1],
        encoder=config.encoder,
        tokenizer=config.tokenizer,
        tokenizer_fingerprint=arguments["settings"]["tokenizer_fingerprint"],
        vocabulary=len(tokenizer),
        has_start_token=bool(start_tokens(tokenizer)),
        left_out=total - len(shards.hashes),
        seed=config.seed,
        sources=arguments["sources"],
        settings=arguments["settings"],
        versions=_versions(),
    )
    writer.finish(manifest)
    shutil.rmtree(out / PARTIAL)


def _located(name: str, kind: Kind) -> str:
    """A model's name for other folders; refuses at once a path to nothing."""
    if name.startswith((".", "/", "~")):
        resolve(name, kind)
    return absolute(name)


def _given_codebook(config: PrepareConfig) -> PreparedCorpus | None:
    """The corpus of `--codebook`, whose embeddings these documents' must be like.

    Raises:
        InputError: no corpus, one of another encoder, or actions of one's own are asked for as well.
    """
    if config.codebook is None:
        return None
    if config.actions is not None:
        raise InputError(
            f"--actions {config.actions}: the actions are those of --codebook {config.codebook}; leave it out"
        )
    corpus = PreparedCorpus.load(config.codebook)
    if encoder_fingerprint(config.encoder) != corpus.manifest.settings.get("encoder_fingerprint"):
        raise InputError(
            f"--encoder {config.encoder}: the actions of {config.codebook} are of embeddings by "
            f"{corpus.manifest.encoder}; set --encoder to that"
        )
    return corpus


def _settings(config: PrepareConfig, fingerprint: str, given: PreparedCorpus | None) -> dict[str, Any]:
    """What decides a corpus' bytes besides its documents."""
    bf16 = compute_dtype(config.precision, device()) == torch.bfloat16
    resolved = {
        "precision": "bf16" if bf16 else "fp32",
        "tokenizer_fingerprint": fingerprint,
        "encoder_fingerprint": encoder_fingerprint(config.encoder),
        "codebook_fingerprint": None if given is None else checksum(given.path / CODEBOOK),
    }
    return {name: resolved.get(name, getattr(config, name, None)) for name in ENCODING + ASSEMBLY}


def _differences(found: dict[str, Any], asked: dict[str, Any], settings: tuple[str, ...]) -> str:
    """What distinguishes the sources and some settings of two preparations, in words; empty where nothing does."""
    differences = [
        f"another {name.removesuffix('_fingerprint')}"
        if name.endswith("_fingerprint")
        else f"{name} {found['settings'].get(name)} there, {asked['settings'][name]} here"
        for name in settings
        if found["settings"].get(name) != asked["settings"][name]
    ]
    if [source["fingerprint"] for source in found["sources"]] != [source["fingerprint"] for source in asked["sources"]]:
        differences.append("other documents")
    return ", ".join(differences)


def _splits(shards: EncodedShards, total: int, config: PrepareConfig) -> np.ndarray:
    """The split of every document that is kept."""
    kept = len(shards.hashes)
    if not kept:
        raise InputError(
            f"{' '.join(config.inputs)}: none of {total} documents has at least {config.min_sentences} sentences; set "
            "--min-sentences lower, or check --text-field"
        )
    if kept < total:
        note(f"left out {total - kept:,} of {total:,} documents with fewer than {config.min_sentences} sentences")
    return assign_splits(shards.hashes, config.validation_fraction, config.test_fraction)


def _codebook(shards: EncodedShards, training: np.ndarray, config: PrepareConfig) -> np.ndarray:
    """Fit the codebook on training sentences."""
    num_sentences = int(shards.num_sentences[training].sum())
    num_actions = config.actions or max(2, min(DEFAULT_ACTIONS, num_sentences // SENTENCES_PER_ACTION))
    sample = shards.sample_embeddings(training, num_actions * SAMPLE_PER_ACTION, config.seed)
    note(f"fitting {num_actions} actions on {len(sample):,} training sentences")
    codebook = fit_codebook(sample, num_actions, iterations=config.kmeans_iterations, seed=config.seed)
    if num_sentences < num_actions * SENTENCES_PER_ACTION:
        note(
            f"few training sentences for {num_actions} actions: {num_sentences}, {SENTENCES_PER_ACTION} an action are "
            f"advisable; --actions {max(2, num_sentences // SENTENCES_PER_ACTION)} would keep to that"
        )
    return codebook


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
