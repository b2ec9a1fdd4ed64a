"""The audit trail: a line for each sentence that was generated, which says what it is, what was planned and by what.

Sizes: K actions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from planlm import __version__
from planlm.config import GenerateConfig
from planlm.files import append_lines, beside_result, read_json
from planlm.model.configuration import PlanLMConfig
from planlm.model.described import PlannedSentence, label_of
from planlm.model.loading import model_checksum, model_folder
from planlm.model.prompts import Prompt
from planlm.model.steering import Steering

FORMAT = 1
"""Of the lines; docs/audit.md says what they hold."""

SAMPLING = ("temperature", "top_p", "max_new_tokens", "attempts")
"""Options of `generate` that a line has beside the seed."""

DIGITS = 5
"""Significant ones of a probability: those of 1,024 actions add up to 1 within 0.00005, and a line has 12 kB."""


class AuditTrail:
    """Appends the sentences of finished texts to a file; several processes may write to the same one.

    Args:
        config: of the call; `audit` is the file.
        model: the model's configuration.
        selection: what is generated with.
        steering: what is banned and favoured.
    """

    def __init__(self, config: GenerateConfig, model: PlanLMConfig, selection: str, steering: Steering) -> None:
        self._path, self._labels, self._can_be_written = Path(str(config.audit)), model.action_labels, True
        identity = model_folder(config.run).parent / "identity.json"
        self._made_with = {
            "selection": selection,
            **steering.describe(),
            "sampling": {name: getattr(config, name) for name in SAMPLING},
            "seed": config.seed,
            "model": model_checksum(config.run),
            "corpus": read_json(identity).get("corpus") if identity.exists() else None,
            "codebook": model.codebook_fingerprint,
            "planlm": __version__,
        }

    def add(self, prompt: Prompt, sample: int, sentences: Sequence[PlannedSentence]) -> None:
        """Append a text's sentences; a file that cannot be written is a warning.

        Args:
            prompt: what was continued.
            sample: number of the text among the continuations of its prompt.
            sentences: those that were continued or begun.
        """
        about = {
            "format": FORMAT,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "text": _digest([self._made_with, prompt.text, prompt.plan, prompt.number, sample])[:16],
            "prompt_sha256": hashlib.sha256(prompt.text.encode()).hexdigest(),
            "row": prompt.number,
            "sample": sample,
        }
        lines = []
        for number, one in enumerate(sentences):
            plan = None if one.probabilities is None else [float(f"{p:.{DIGITS}g}") for p in one.probabilities.tolist()]
            line = about | {
                "number": number,
                "place": one.place,
                **({"prompt": prompt.text} if number == 0 else {}),
                "sentence": one.text,
                "finished": one.finished,
                "action": one.action,
                "label": label_of(one.action, self._labels),
                "forced": one.forced,
                "drawn": one.drawn,
                "carried": one.carried,
                "plan": plan,
            }
            lines.append(json.dumps(line | self._made_with, ensure_ascii=False))
        if self._can_be_written:  # else it was said once
            with beside_result(self._path):
                self._can_be_written = False
                append_lines(self._path, lines)
                self._can_be_written = True


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
