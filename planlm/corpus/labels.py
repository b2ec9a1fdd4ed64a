"""Short labels of a corpus' actions: made of their terms, until somebody names one. `action_labels.json` keeps them.

The file belongs to no fingerprint: naming an action changes nothing that is trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from planlm.errors import InputError
from planlm.files import read_json, write_json, write_text
from planlm.labels import find_action

LABELS = "action_labels.json"

LONGEST = 60
"""Characters of a label."""

TERMS = 3
"""Of a label that nobody has given."""


def label_of(terms: Sequence[str]) -> str:
    """A label made of the most distinctive terms; empty where there are none."""
    return " ".join(terms[:TERMS])[:LONGEST]


def read_labels(corpus: Path, num_actions: int) -> list[str] | None:
    """The labels of a prepared corpus, in the order of its actions; None where it has none.

    Raises:
        InputError: the file is not, byte for byte, what `write_labels` writes.
    """
    path = corpus / LABELS
    if not path.exists():
        return None
    labels: Any = read_json(path).get("labels")
    sound = isinstance(labels, list) and len(labels) == num_actions and all(map(_is_label, labels))
    if not sound or path.read_bytes() != _text(labels).encode():
        raise InputError(
            f"{path}: not the {num_actions} labels that planlm actions --name writes; delete it, and it is made again"
        )
    return labels


def write_labels(corpus: Path, labels: Sequence[str]) -> None:
    """Keep one label for each action."""
    write_text(corpus / LABELS, _text(labels), within=corpus)


def _text(labels: Sequence[str]) -> str:
    """The labels with a checksum, as in a corpus' other files."""
    content = {"labels": list(labels), "checksum": xxhash.xxh3_128_hexdigest("\n".join(labels).encode())}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def renamed(labels: Sequence[str], names: Sequence[str]) -> list[str]:
    """Labels with some replaced.

    Args:
        labels: one for each action.
        names: `ACTION=LABEL` each, the action by number or by its label so far.

    Raises:
        InputError: not of that form, no such action, or a label that could be taken for something else in a plan.
    """
    found = list(labels)
    for name in names:
        action, equals, label = name.partition("=")
        label = " ".join(label.split())
        if not equals:
            raise InputError(f'--name {name!r}: expected ACTION=LABEL, such as 12="birth and family"')
        if not label or not _is_label(label) or label == "*" or label.isdigit():
            raise InputError(
                f"--name {name!r}: a label has 1 to {LONGEST} characters, no comma, and is neither a number nor *"
            )
        found[find_action(action, len(found), found, "--name")] = label
    return found


def label_run(run: Path, labels: Sequence[str], fingerprint: str) -> None:
    """Give the model of a run these labels.

    Args:
        run: run directory of `train`.
        labels: one for each action.
        fingerprint: of the corpus that they are of.

    Raises:
        InputError: no trained run, or one of another corpus.
    """
    path = run / "model" / "config.json"
    if not path.is_file():
        raise InputError(f"--run {run}: no trained model in it; give the run directory of planlm train")
    if (trained_on := read_json(run / "identity.json").get("corpus")) != fingerprint:
        raise InputError(f"--run {run}: was trained on another corpus ({str(trained_on)[:12]}, not {fingerprint[:12]})")
    content: dict[str, Any] = read_json(path)
    write_json(path, content | {"action_labels": list(labels)}, within=run)


def _is_label(label: object) -> bool:
    return isinstance(label, str) and len(label) <= LONGEST and label.isprintable() and "," not in label
