"""Finished texts on disk, from which an interrupted call goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from planlm.files import appending, belonging, write_text
from planlm.terminal import note


class KeptTexts:
    """Finished texts in a file: a line that says what they were made with, then a line for each.

    Args:
        path: the file; one that was made with something else, or is damaged at its beginning, is begun anew.
        made_with: all that decides a text, ready for JSON.
        read: number and content of a text, from its line's object; ValueError, TypeError or LookupError: it is damaged.
        within: the folder that the file belongs to, where that is one of ours.
        guard: what a failure to write goes through, with the path: `files.beside_result` makes a warning of it, upon
            which no more is written.

    Attributes:
        done: contents of the finished texts by number.
    """

    def __init__(
        self,
        path: Path,
        made_with: dict[str, Any],
        read: Callable[[Any], tuple[int, Any]],
        within: Path | None = None,
        guard: Callable[[Path], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._path, self._within, self._guard, self._is_kept = path, within, guard, False
        self.done: dict[int, Any] = {}
        with guard(path):
            lines = self._read(made_with, read)
            write_text(path, "".join(line + "\n" for line in lines), within)
            self._is_kept = True

    def _read(self, made_with: dict[str, Any], read: Callable[[Any], tuple[int, Any]]) -> list[str]:
        """Sound lines of the file, up to the first that is not, as the last of a killed process may be."""
        first = json.dumps({"made_with": made_with}, ensure_ascii=False)
        path = belonging(self._path, self._within)
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else [first]
        if lines[0] != first:
            note(f"{self._path}: made with another model or other settings; begun anew")
            return [first]
        for at, line in enumerate(lines[1:], 1):
            try:
                number, content = read(json.loads(line))
            except (ValueError, TypeError, LookupError):
                return lines[:at]
            self.done[number] = content
        return lines

    def add(self, texts: Sequence[dict[str, Any]]) -> None:
        """Write texts, objects as `read` takes them."""
        if self._is_kept:
            self._is_kept = False
            with self._guard(self._path), appending(self._path, self._within) as file:
                file.writelines(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
                self._is_kept = True
