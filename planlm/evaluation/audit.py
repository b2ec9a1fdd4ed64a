"""`planlm audit`: what models have written, from audit trails: drift from their corpus, certainty, repetition.

Sizes: n texts, K actions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array  # type: ignore[import-untyped]
from scipy.special import entr  # type: ignore[import-untyped]

from planlm.config import AuditConfig
from planlm.corpus.labels import read_labels
from planlm.corpus.store import PreparedCorpus
from planlm.evaluation.audit_lines import AuditedSentence, read_audits
from planlm.evaluation.drift import Sequences, drift, shares_of
from planlm.evaluation.generation import corpus_encoder
from planlm.evaluation.generation_metrics import distinct, sentence_actions
from planlm.evaluation.generation_statistics import with_interval
from planlm.progress import Progress
from planlm.terminal import note

AT_ONCE = 4096
"""Sentences embedded at a time."""

NAMED = 10
"""Damaged lines named on stderr; the result has all."""

Texts = Sequence[Sequence[AuditedSentence]]


def audit(config: AuditConfig) -> dict[str, Any]:
    """Summarise audit trails that `generate --audit` wrote.

    Returns:
        `texts`, `sentences`, `models` (of each the checksum, texts and sentences), `damaged` (lines that cannot be
        read); `drift` of the actions of the `written` sentences (found as preparation finds them) and of the planner's
        distributions (`planned`), see `drift.drift`; `entropy` of these (nats) and `unigram_entropy` of the corpus's
        actions; of repetition `repeated` (share of sentences that stand in the same text before), `distinct` (n-grams
        of words, of n from 1 to 3, mean of texts) and `same_action` (share of sentences with the action of the one
        before), with `corpus_same_action`. A figure has `value` and `ci95`, over texts; what nothing is known of is
        None.

    Raises:
        InputError: no audit, one of a model that was trained on another corpus, or an encoder that cannot be loaded.
        OSError: a file cannot be read.
    """
    corpus = PreparedCorpus.load(config.corpus)
    texts, damaged = read_audits(config.files, corpus)
    for one in damaged[:NAMED]:
        note(f"{one['file']}:{one['line']}: {one['reason']}; left out")
    if len(damaged) > NAMED:
        note(f"{len(damaged) - NAMED:,} more damaged lines left out; --json names all")
    num_actions = corpus.manifest.num_actions
    background = Sequences.of_documents(
        corpus.split("train").select_columns(["actions"]).with_format("arrow").iter(1000)
    )
    written = _written(texts, corpus)
    begun = _places([text for text in texts if any(one.finished for one in text)], lambda one: one.finished)
    planned = _places(texts, lambda one: one.plan is not None)
    labels = read_labels(corpus.path, num_actions) or [""] * num_actions
    how = {"resamples": config.bootstrap, "seed": config.seed}
    (same, pairs), (own_same, own_pairs) = background.repeats(), written.repeats()
    return {
        "corpus": config.corpus,
        "texts": len(texts),
        "sentences": sum(map(len, texts)),
        "models": _models(texts),
        "damaged": damaged,
        "drift": {
            "written": drift(written.counts(num_actions), begun, background, labels, **how),
            "planned": drift(_planned(texts, num_actions), planned, background, labels, **how),
        },
        "entropy": _entropy(texts, **how),
        "unigram_entropy": float(entr(shares_of(background.actions, num_actions)).sum()),
        **_repetition(texts, **how),
        "same_action": _ratio(own_same, own_pairs, **how),
        "corpus_same_action": float(same.sum() / pairs.sum()) if pairs.sum() else None,
    }


def _models(texts: Texts) -> list[dict[str, Any]]:
    """Each model, the most texts first."""
    of_texts = Counter(text[0].model for text in texts)
    of_sentences = Counter(one.model for text in texts for one in text)
    return [
        {"model": model, "texts": count, "sentences": of_sentences[model]} for model, count in of_texts.most_common()
    ]


def _written(texts: Texts, corpus: PreparedCorpus) -> Sequences:
    """The actions of the finished sentences."""
    encoder, codebook = corpus_encoder(corpus), corpus.codebook.numpy()
    sentences = [one.sentence for text in texts for one in text if one.finished]
    actions = [np.zeros(0, np.int64)]
    with Progress("embed", len(sentences), "sentences") as progress:
        for begin in range(0, len(sentences), AT_ONCE):
            part = sentences[begin : begin + AT_ONCE]
            actions.append(sentence_actions(part, encoder, codebook).astype(np.int64))
            progress.advance(len(part))
    lengths = np.array([sum(one.finished for one in text) for text in texts], dtype=np.int64)
    return Sequences(np.concatenate(actions), lengths[lengths > 0])


def _places(texts: Texts, has: Callable[[AuditedSentence], bool]) -> NDArray[np.int64]:
    """The place of each text's first sentence that has what is counted, 0 where none has, `[n]`."""
    return np.array([next((one.place for one in text if has(one)), 0) for text in texts], dtype=np.int64)


def _planned(texts: Texts, num_actions: int) -> csr_array:
    """How often the planner would choose each action, by its probabilities, `[n, K]`."""
    nothing = np.zeros(num_actions)
    return csr_array([sum((one.plan for one in text if one.plan is not None), nothing) for text in texts])


def _entropy(texts: Texts, *, resamples: int, seed: int) -> dict[str, Any] | None:
    """Mean over the sentences that the planner chose for."""
    of_each = [[float(entr(one.plan).sum()) for one in text if one.plan is not None] for text in texts]
    sums, counts = (np.array([measure(own) for own in of_each], dtype=np.float64) for measure in (sum, len))
    return _ratio(sums, counts, resamples=resamples, seed=seed)


def _repetition(texts: Texts, *, resamples: int, seed: int) -> dict[str, Any]:
    """`repeated` and `distinct`; case and white space make no difference."""
    how = {"resamples": resamples, "seed": seed}
    own = [[" ".join(one.sentence.casefold().split()) for one in text if one.finished] for text in texts]
    lengths = np.array(list(map(len, own)), dtype=np.float64)
    repeated = lengths - np.array([len(set(sentences)) for sentences in own])
    words = [" ".join(one.sentence for one in text).casefold().split() for text in texts]
    ones = np.ones(len(texts))
    return {
        "repeated": _ratio(repeated, lengths, **how),
        "distinct": [_ratio(np.array([distinct(one, n) for one in words]), ones, **how) for n in (1, 2, 3)],
    }


def _ratio(
    parts: NDArray[np.float64], wholes: NDArray[np.float64], *, resamples: int, seed: int
) -> dict[str, Any] | None:
    """A ratio of sums over texts, `[n]` each, with its interval; None of nothing."""
    parts, wholes = parts[wholes > 0], wholes[wholes > 0]
    if not len(wholes):
        return None

    def ratio(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = parts[drawn].sum(axis=1) / wholes[drawn].sum(axis=1)
        return found

    return with_interval(ratio, len(parts), resamples, seed)
