"""Actions by number or by label: what users write of one, and how it is shown."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from planlm.errors import InputError


def find_action(written: str, num_actions: int, labels: Sequence[str] | None, where: str) -> int:
    """The action that a user means.

    Args:
        written: its number, or its label whatever the case and the space around it; digits alone are always a number.
        num_actions: K.
        labels: of the actions in order, empty for one without; None: none has any.
        where: what the error names, e.g. `--ban`.

    Raises:
        InputError: there is no such action, or several have this label.
    """
    text = written.strip()
    if text.isascii() and text.isdigit():
        number = text.lstrip("0") or "0"
        if len(number) < 10 and int(number) < num_actions:
            return int(number)
        raise InputError(f"{where} {text[:40]}: expected an action from 0 to {num_actions - 1}")
    if not labels:
        raise InputError(
            f"{where} {text[:40]!r}: expected an action from 0 to {num_actions - 1}; this model's have no labels"
        )
    folded = [label.strip().casefold() for label in labels]
    found = [action for action, label in enumerate(folded) if label and label == text.casefold()]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{where} {text!r}: the label of the actions {', '.join(map(str, found))}; give one's number")
    close = difflib.get_close_matches(text.casefold(), [label for label in folded if label], n=1, cutoff=0.0)
    hint = f"; the closest is {show_action(folded.index(close[0]), labels)}" if close else ""
    raise InputError(f"{where} {text[:40]!r}: no action has this label{hint}")


def show_action(action: int, labels: Sequence[str] | Mapping[int, str] | None) -> str:
    """`12 (birth and family)`, or `12` where it has no label."""
    return f"{action} ({labels[action]})" if labels and labels[action] else str(action)
