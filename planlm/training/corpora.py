"""The corpora that a run of `planlm train` has beside its own: those of `--mix` and of `--rehearsal`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError
from planlm.model.planner import codebook_fingerprint

LEAST = 0.01
"""Of the windows that `--corpus` has to have: an epoch, of which it is the measure, is a hundred times as long then."""

Mix = list[tuple[PreparedCorpus, float]]
"""Corpora of `--mix` and their shares of the windows."""


def parse_mix(mix: Sequence[str]) -> dict[str, float]:
    """The share of each corpus of `--mix`.

    Raises:
        InputError: not of the form CORPUS=SHARE, a corpus twice, or shares that leave nothing to `--corpus`.
    """
    found: dict[str, float] = {}
    for one in mix:
        path, _, written = one.rpartition("=")
        try:
            share = float(written)
        except ValueError:
            share = 0.0
        if not path or not 0 < share < 1:
            raise InputError(f"--mix {one!r}: expected CORPUS=SHARE with a share between 0 and 1, such as news=0.3")
        if (name := str(Path(path))) in found:
            raise InputError(f"--mix {name}: given twice; add the shares up")
        found[name] = share
    if (total := sum(found.values())) > 1 - LEAST:
        raise InputError(f"--mix: shares add up to {total:g}; leave {LEAST:.0%} of the windows or more to --corpus")
    return found


def load_mix(mix: Sequence[str], corpus: PreparedCorpus) -> Mix:
    """The corpora of `--mix` and their shares.

    Raises:
        InputError: as `parse_mix`; none there, or of another tokenizer, encoder or codebook than `corpus`.
    """
    found, known = [], {corpus.fingerprint}
    for path, share in parse_mix(mix).items():
        other = load_beside("--mix", path, corpus)
        if _actions(other) != _actions(corpus):
            raise InputError(
                f"--mix {path}: has other actions than {corpus.path}; prepare it again with --codebook {corpus.path}"
            )
        if other.fingerprint in known:
            raise InputError(f"--mix {path}: has the same content as another corpus of this run; leave it out")
        known.add(other.fingerprint)
        found.append((other, share))
    return found


def load_beside(option: str, path: str, corpus: PreparedCorpus) -> PreparedCorpus:
    """A corpus with the tokenizer of `corpus`, its training split read and checked.

    Raises:
        InputError: names the option: there is none, or its tokenizer is another one.
    """
    found = PreparedCorpus.load(path)
    if found.manifest.tokenizer_fingerprint != corpus.manifest.tokenizer_fingerprint:
        raise InputError(
            f"{option} {path}: prepared with the tokenizer of {found.manifest.tokenizer}, which is not that of "
            f"{corpus.path}; prepare it again with --tokenizer {corpus.manifest.tokenizer}"
        )
    found.split("train")
    return found


def _actions(corpus: PreparedCorpus) -> tuple[str, str]:
    """What says which action is which, and from what embeddings."""
    return codebook_fingerprint(corpus.codebook), str(corpus.manifest.settings.get("encoder_fingerprint"))
