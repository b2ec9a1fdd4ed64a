"""Text on a stream while it is written, each sentence on a line behind the action that it follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from planlm.model.tracking import SentenceTracker, TrackedText


class SentenceStreamer(BaseStreamer):
    """Prints a text as `generate` writes it: `[12 (birth and family)] She was born in 1905.` and so on.

    Plain text and flushed at every token, for terminals and logs alike.

    Args:
        tracker: what the text is generated with.
        head: from a text up to a sentence, to what stands before that; empty for nothing.
        stream: where to.
    """

    def __init__(self, tracker: SentenceTracker, head: Callable[[TrackedText], str], stream: TextIO) -> None:
        self._tracker, self._head, self._stream = tracker, head, stream
        self._ids: list[int] = []
        self._sentence, self._shown = -1, ""

    def put(self, value: Tensor) -> None:
        """Take the prompt `[1, W]`, then token by token `[1]`."""
        tokens = value.flatten().tolist()
        if not self._ids:
            self._ids = tokens
            return
        text = self._tracker.track(self._ids)
        self._ids += tokens
        if text.segments[-1] != self._sentence:
            self.end()
            self._sentence = text.segments[-1]
        written = self._tracker.decode(self._ids[text.open_start :]).strip()
        if not written or written.endswith("\ufffd"):  # a part of a character
            return
        if not self._shown and (head := self._head(text)):
            self._stream.write(f"[{head}] ")
        self._stream.write(written[len(self._shown) :])
        self._stream.flush()
        self._shown = written

    def end(self) -> None:
        """End the line of a sentence."""
        if self._shown:
            self._stream.write("\n")
            self._stream.flush()
        self._shown = ""
