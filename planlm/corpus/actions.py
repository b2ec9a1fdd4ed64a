"""What the actions of a corpus mean: how common they are, their typical sentences and their distinctive terms."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from planlm.config import ActionsConfig
from planlm.corpus.store import PreparedCorpus
from planlm.corpus.writing import joined
from planlm.errors import InputError
from planlm.progress import Progress

EXAMPLES_OF_ONE = 5
"""Times as many typical sentences where only one action is asked for."""

MOST_WORDS = 5_000_000
"""Counts of a word in an action that are kept: some 500 MB."""

LONGEST = 20_000
"""Characters of a sentence that are looked at."""

TOGETHER = 4096
"""Sentences whose distances are computed at a time."""

_WORD = re.compile(r"[^\W\d_][^\W\d_]+(?:['’-][^\W\d_]+)*")


@dataclass(frozen=True)
class ActionDescription:
    """One action, as the training split shows it.

    Attributes:
        action: its number.
        sentences: training sentences that have it.
        share: of all training sentences, from 0 to 1.
        examples: the sentences nearest to the centroid, nearest first, no text twice.
        terms: the words most distinctive for it, by c-TF-IDF (Grootendorst, arXiv 2203.05794).
    """

    action: int
    sentences: int
    share: float
    examples: list[str]
    terms: list[str]


def describe_actions(config: ActionsConfig) -> list[ActionDescription]:
    """Describe every action of a corpus, the most common first, or one with more examples.

    Raises:
        InputError: no such corpus or action.
    """
    corpus = PreparedCorpus.load(config.corpus)
    num_actions = corpus.manifest.num_actions
    if config.action is not None and not 0 <= config.action < num_actions:
        raise InputError(f"--action {config.action}: {config.corpus} has the actions 0 to {num_actions - 1}")
    wanted = list(range(num_actions)) if config.action is None else [config.action]
    num_examples = config.examples * (1 if config.action is None else EXAMPLES_OF_ONE)
    examples, words = _read(corpus, set(wanted), num_examples)
    terms = _distinctive(words, wanted, config.terms)
    counts = corpus.action_counts.numpy()
    descriptions = [
        ActionDescription(
            action=action,
            sentences=int(counts[action]),
            share=float(counts[action] / counts.sum()),
            examples=[text for _, text in examples[action]],
            terms=terms[action],
        )
        for action in wanted
    ]
    return sorted(descriptions, key=lambda description: -description.sentences)


def _read(
    corpus: PreparedCorpus, wanted: set[int], num_examples: int
) -> tuple[dict[int, list[tuple[float, str]]], list[Counter[str]]]:
    """One pass over the training split: nearest sentences of the wanted actions, and words of every action."""
    documents = corpus.split("train").with_format("arrow", columns=["text", "sentence_spans", "embeddings", "actions"])
    codebook = corpus.codebook.numpy()
    examples: dict[int, list[tuple[float, str]]] = {action: [] for action in wanted}
    words: list[Counter[str]] = [Counter() for _ in range(corpus.manifest.num_actions)]
    with Progress("Reading sentences", len(documents), "documents") as progress:
        for table in documents.iter(100):
            for action, distance, text in _sentences(table, codebook):
                words[action].update(word.lower() for word in _WORD.findall(text[:LONGEST]))
                if action in wanted:
                    _keep_nearest(examples[action], num_examples, distance, text[:LONGEST])
            _forget_rare(words)
            progress.advance(len(table))
    return examples, words


def _forget_rare(words: list[Counter[str]]) -> None:
    """Keep memory in bounds: drop the rarest words, none of which is typical of an action, when there are too many."""
    least = 1
    while sum(map(len, words)) > MOST_WORDS:
        for counter in words:
            for word in [word for word, count in counter.items() if count <= least]:
                del counter[word]
        least *= 2


def _sentences(table: pa.Table, codebook: np.ndarray) -> Iterator[tuple[int, float, str]]:
    """Action, squared distance to its centroid, and text of every sentence in some documents, one at a time."""
    for row in range(len(table)):
        document = table.slice(row, 1)
        text = document["text"][0].as_py()
        actions, spans, embeddings = (joined(document[name]) for name in ("actions", "sentence_spans", "embeddings"))
        for start in range(0, len(actions), TOGETHER):
            block = slice(start, start + TOGETHER)
            distances = np.square(embeddings[block].astype(np.float32) - codebook[actions[block]]).sum(axis=1)
            for action, distance, (begin, end) in zip(actions[block], distances, spans[block], strict=True):
                yield int(action), float(distance), text[begin:end]


def _keep_nearest(examples: list[tuple[float, str]], size: int, distance: float, text: str) -> None:
    """Insert into a short sorted list of the `size` nearest, unless the text is there already."""
    if len(examples) == size and (not size or distance >= examples[-1][0]):
        return
    if all(text != other for _, other in examples):
        examples.append((distance, text))
        examples.sort()
        del examples[size:]


def _distinctive(words: list[Counter[str]], wanted: list[int], size: int) -> dict[int, list[str]]:
    """c-TF-IDF: a word's share of an action's words, times log(1 + mean words per action / the word's count)."""
    totals: Counter[str] = Counter()
    for counter in words:
        totals.update(counter)
    mean = totals.total() / len(words)
    terms = {}
    for action in wanted:
        score = {word: count * math.log1p(mean / totals[word]) for word, count in words[action].items()}
        terms[action] = sorted(score, key=lambda word: (-score[word], word))[:size]
    return terms
