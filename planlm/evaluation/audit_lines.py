"""Reading audit trails: which lines are sound, and which text and corpus they belong to.

Sizes: K actions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError
from planlm.files import is_utf8
from planlm.model.audit import FORMAT
from planlm.model.planner import codebook_fingerprint

_FIELDS = {"text": str, "number": int, "place": int, "sentence": str, "finished": bool, "model": str, "codebook": str}
"""What every line needs, beside `forced` and `plan`, which may be null."""


@dataclass(frozen=True, slots=True)
class AuditedSentence:
    """What an audit says of a sentence.

    Attributes:
        number: among the sentences that were generated of its text.
        place: in the whole text.
        sentence: its text.
        finished: whether generation has come to its end.
        model: checksum of what wrote it.
        plan: the planner's distribution, float64 `[K]`; None where it did not choose.
    """

    number: int
    place: int
    sentence: str
    finished: bool
    model: str
    plan: NDArray[np.float64] | None


def read_audits(
    files: Sequence[str], corpus: PreparedCorpus
) -> tuple[list[list[AuditedSentence]], list[dict[str, Any]]]:
    """The texts of audit files, each with its sentences in order, and the lines that cannot be read.

    Args:
        files: what `generate --audit` wrote to.
        corpus: that the models were trained on.

    Returns:
        The texts, and of each damaged line `file`, `line` (from 1) and `reason`.

    Raises:
        InputError: a model was trained on another corpus, or no line is sound.
        OSError: a file cannot be read.
    """
    texts: dict[str, dict[int, AuditedSentence]] = {}
    damaged: list[dict[str, Any]] = []
    codebook = codebook_fingerprint(corpus.codebook)
    for file, number, raw in _lines(files):
        try:
            line = _fields(raw)
            _check_corpus(f"{file}:{number}", line, corpus, codebook)
            sentence = _sentence(line, corpus.manifest.num_actions)
            own = texts.setdefault(line["text"], {})
            # The same call writes the same texts, with the same ids: after an interruption, twice.
            if own.setdefault(sentence.number, sentence).sentence != sentence.sentence:
                raise ValueError(f"sentence {sentence.number} of text {line['text']:.40} a second time")
        except InputError:
            raise
        except ValueError as error:
            damaged.append({"file": file, "line": number, "reason": str(error)})
    if not texts:
        why = "".join(f" ({one['file']}:{one['line']}: {one['reason']})" for one in damaged[:1])
        raise InputError(f"{', '.join(files)}: no line of an audit{why}; `planlm generate --audit FILE` writes them")
    return [[own[number] for number in sorted(own)] for own in texts.values()], damaged


def _lines(files: Sequence[str]) -> Iterator[tuple[str, int, bytes]]:
    for file in files:
        with open(file, "rb") as content:
            yield from ((file, number, raw) for number, raw in enumerate(content, 1) if raw.strip())


def _fields(raw: bytes) -> dict[str, Any]:
    """A line's fields; raises ValueError where they are not those of an audit."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(line, dict) or line.get("format") != FORMAT:
        raise ValueError(f"not a line of an audit of format {FORMAT}")
    for name, kind in _FIELDS.items():
        if type(line.get(name)) is not kind:
            raise ValueError(f"{name} is {line.get(name)!r:.40}")
    if not isinstance(line.get("corpus"), str | None) or line["place"] < 0:
        raise ValueError(f"corpus is {line.get('corpus')!r:.40}, place {line['place']}")
    if not is_utf8(line["sentence"]):
        raise ValueError("sentence holds half of a character")
    return line


def _check_corpus(where: str, line: dict[str, Any], corpus: PreparedCorpus, codebook: str) -> None:
    """By the corpus's fingerprint; a model folder knows the actions alone."""
    own, given = line.get("corpus"), corpus.fingerprint
    if own is None:
        own, given = line["codebook"], codebook
    if own != given:
        raise InputError(
            f"{where}: its model was trained on another corpus than {corpus.path} ({own!s:.12}, not {given:.12}); "
            "set --corpus to that one"
        )


def _sentence(line: dict[str, Any], num_actions: int) -> AuditedSentence:
    """Raises ValueError where the plan is no distribution over K actions."""
    plan = None
    if line.get("plan") is not None:
        try:
            plan = np.asarray(line["plan"], dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            plan = np.zeros(0)
        total = plan.sum() if plan.shape == (num_actions,) and (plan >= 0).all() else 0.0
        if not abs(total - 1) < 0.01:  # shares are rounded
            raise ValueError(f"plan is not a distribution over {num_actions} actions")
        plan = plan / total if line.get("forced") is None else None
    return AuditedSentence(line["number"], line["place"], line["sentence"], line["finished"], line["model"], plan)
