"""What the commands on a corpus take."""

from __future__ import annotations

from dataclasses import dataclass

from planlm.config.base import DEFAULT_ENCODER, DEFAULT_LM, CommandConfig, option, required
from planlm.settings import BELOW_ONE, COUNT, NUMBER, SEED, count


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(CommandConfig):
    """Raw text to a prepared corpus: sentences, embeddings, codebook, actions, tokens."""

    inputs: tuple[str, ...] = required(
        ".txt, .json, .jsonl, .ndjson, WikiText's .raw (also .gz, .bz2, .xz, .zst) or .parquet files, folders of "
        "them, or hf:name[:config][@split]",
        positional=True,
    )
    out: str = required("folder to write the prepared corpus to")
    text_field: str = option("text", "field or column that holds a document's text")
    id_field: str = option("id", "field or column that holds a document's id; where absent, file name and row are used")
    actions: int | None = option(
        None,
        "number of actions K; default: the papers' 1024, or as many as the training sentences allow at 39 each",
        limit=count(10_000_000),
    )
    codebook: str | None = option(
        None, "prepared corpus whose actions these documents get, labels too; default: actions of their own"
    )
    encoder: str = option(DEFAULT_ENCODER, "sentence-transformers model, by hub name or folder")
    tokenizer: str = option(DEFAULT_LM, "tokenizer of the LM to be trained, by hub name or folder")
    validation_fraction: float = option(0.05, "fraction of documents in the validation split", limit=BELOW_ONE)
    test_fraction: float = option(0.05, "fraction of documents in the test split", limit=BELOW_ONE)
    min_sentences: int = option(2, "shorter documents are left out (sentences)", limit=COUNT)
    max_documents: int | None = option(None, "stop after so many documents", limit=COUNT)
    shard_documents: int = option(
        1000, "documents per shard: the unit that is resumed, and the memory in use", limit=COUNT
    )
    kmeans_iterations: int = option(20, "k-means iterations", limit=count(100_000))
    precision: str = option(
        "auto", "encoder arithmetic; auto: bf16 where the processor has it", choices=("auto", "bf16", "fp32")
    )
    seed: int = option(0, "seed of k-means and of the sample it is fitted on", limit=SEED)


@dataclass(frozen=True, kw_only=True)
class ActionsConfig(CommandConfig):
    """What each action means: label, size, terms, typical sentences, place in a document, what follows."""

    corpus: str = required("prepared corpus", positional=True)
    action: int | None = option(None, "only this action, with more examples", limit=NUMBER)
    examples: int = option(3, "typical sentences per action", limit=NUMBER)
    terms: int = option(6, "distinctive terms per action", limit=NUMBER)
    name: tuple[str, ...] | None = option(
        None, "label of an action from now on, as ACTION=LABEL; may be given several times"
    )
    run: str | None = option(None, "run directory of train whose model is to have the labels, too")
