"""The quickstart's embedded text: the Wikipedia articles that gensim's wheel carries for its own tests.

gensim is located, never imported: only one data file of it is read. The text is Wikipedia's (CC BY-SA), the first
articles of a 2016 dump: about 90 long ones after disambiguation pages and redirects are left out.
"""

from __future__ import annotations

import bz2
import importlib.util
import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, HTMLEntity, Node, Tag, Template, Text, Wikilink
from mwparserfromhell.wikicode import Wikicode

from planlm.errors import InputError

DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

MIN_CHARACTERS = 1000
"""Shorter results are disambiguation pages and stubs, whose few sentences give a planner nothing to go on."""

_LIST = "\x00"
"""Marks a line as a list item, a definition or an indented formula."""
_HOLE = "\x01"
"""Marks where a formula or a table stood: the sentence around it would not read as one."""

_APPENDIX = re.compile(
    r"^==\s*(?:references?|see also|external links|further reading|notes|footnotes|notes and references|"
    r"bibliography|sources|citations|works cited|literature|selected bibliography|filmography|discography)\s*==\s*$",
    re.IGNORECASE | re.MULTILINE,
)
_NOT_PROSE = frozenset({"ref", "references", "table", "gallery", "timeline", "imagemap", "source", "pre", "s", "del"})
_FORMULAS = frozenset({"math", "chem", "ce", "code", "tt", "syntaxhighlight", "score"})
_LIST_TAGS = frozenset({"li", "dd", "dt", "ol", "ul", "dl"})
_FORMULA_TEMPLATES = frozenset({"chem", "chem2", "math", "mvar", "val", "e", "frac", "sfrac", "eqm", "angbr"})
_PUNCTUATION_TEMPLATES = {
    "'s": "'s", "'": "'", "nbsp": " ", "ndash": "–", "spaced ndash": " – ", "snd": " – ", "mdash": "—", "mdashb": "—",
    "em dash": "—", "en dash": "–", "dash": " – ", "ad": "AD", "bce": "BCE", "bc": "BC",
}  # fmt: skip
_FIRST_ARGUMENT = frozenset({"nihongo", "nowrap", "smaller", "small", "sc", "vanchor", "visible anchor", "mono", "sic"})
_LAST_ARGUMENT = frozenset({"lang", "transl", "quote", "blockquote", "script", "big", "abbr"})
_NAMESPACES = re.compile(r":?\s*(?:file|image|category|media|wikt|wiktionary|[a-z]{2,3}(?:-[a-z]+)?):", re.IGNORECASE)

_REPAIRS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"__[A-Z]+__|'{2,}|\[\[|\]\]|\{\{|\}\}|</?[a-z]+[^<>]*>", ""),
        (r"[ \t\u00a0\u2009\u200a\u202f]+", " "),
        (r"[\u200b-\u200f\u00ad\ufeff]", ""),
        (r"([(\[])(?:\s*(?:[,;:/]|\bor\b|\band\b))+\s*", r"\1"),  # "(; born" after a dropped pronunciation
        (r"(?:\s*(?:[,;:/]|\bor\b))+\s*([)\]])", r"\1"),
        (r"\(\s*(?:pronounced|pronunciation|listen|IPA|or)?\s*\)|\[\s*\]", ""),
        (r"([(\[]) | (?=[)\]])", r"\1"),
        (r"([,;:])(?:\s*[,;])+", r"\1"),
        (r"\s+([,;:.!?](?=\s|$))", r"\1"),
        (r",(?=[.!?](?:\s|$))", ""),
        (r"\"\s*\"|“\s*”", ""),
        (r" {2,}", " "),
    )
)
_PARAGRAPH_END = re.compile(r"^.*[.!?][\"'”’)\]]*(?=\s|$)")


def articles() -> Iterator[dict[str, str]]:
    """Yields the embedded articles as `{"id", "title", "text"}`, one paragraph of plain prose per line of the text.

    Raises:
        InputError: gensim's wheel, or the file inside it, is not installed.
    """
    with bz2.open(dump_path()) as dump:
        for _, element in ElementTree.iterparse(dump):
            if element.tag.rpartition("}")[2] != "page":
                continue
            markup = element.findtext("{*}revision/{*}text") or ""
            title = element.findtext("{*}title") or ""
            is_article = element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None
            identifier = element.findtext("{*}id") or ""
            element.clear()
            if not is_article or "(disambiguation)" in title or title.startswith("List of "):
                continue
            text = plain_text(markup)
            if len(text) >= MIN_CHARACTERS:
                yield {"id": identifier, "title": title, "text": text}


def dump_path() -> Path:
    """Path of the embedded dump inside the installed gensim, which is not imported.

    Raises:
        InputError: it is not there.
    """
    spec = importlib.util.find_spec("gensim")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (path := Path(folder) / DUMP).is_file():
            return path
    raise InputError("the quickstart's articles come with the gensim package: pip install --no-deps gensim==4.4.0")


def plain_text(markup: str) -> str:
    """Prose of a Wikipedia article's `markup`: one paragraph per line, without headings, lists, tables and notes.

    Paragraphs that held a formula are left out whole, and holes that pronunciations and references leave inside
    parentheses are closed. The text ends where the article's appendices begin.
    """
    if appendix := _APPENDIX.search(markup):
        markup = markup[: appendix.start()]
    rendered = _render(mwparserfromhell.parse(markup, skip_style_tags=True))
    # a single line break inside a paragraph is white space in wiki markup; only a blank line ends a paragraph
    groups = itertools.groupby(rendered.split("\n"), key=_is_running_text)
    paragraphs = (_paragraph(" ".join(lines)) for is_text, lines in groups if is_text)
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def _render(code: Wikicode | None) -> str:
    return "".join(_render_node(node) for node in code.nodes) if code is not None else ""


def _render_node(node: Node) -> str:
    if isinstance(node, Text):
        return str(node.value)
    if isinstance(node, HTMLEntity):
        return str(node.normalize())
    if isinstance(node, Wikilink):
        if _NAMESPACES.match(str(node.title)):
            return ""
        return _render(node.text if node.text is not None else node.title)
    if isinstance(node, ExternalLink):
        return _render(node.title)
    if isinstance(node, Template):
        return _render_template(node)
    if isinstance(node, Tag):
        return _render_tag(node)
    return ""  # headings, comments, template arguments


def _render_tag(node: Tag) -> str:
    name = str(node.tag).strip().lower()
    if name in _NOT_PROSE:
        return ""
    if name in _FORMULAS:
        return _HOLE
    if name in _LIST_TAGS:
        return _LIST + _render(node.contents)
    if name == "br":
        return " "
    if name in ("blockquote", "poem", "p", "center", "div"):
        return f"\n{_render(node.contents)}\n"
    return _render(node.contents)


def _render_template(node: Template) -> str:
    """Text of the templates that carry a part of the sentence; the others (notes, boxes, sounds) are dropped."""
    name = str(node.name).strip().lower()
    if name in _PUNCTUATION_TEMPLATES:
        return _PUNCTUATION_TEMPLATES[name]
    if name in _FORMULA_TEMPLATES:
        return _HOLE
    arguments = [_render(p.value).strip() for p in node.params if not p.showkey]
    if name in ("convert", "cvt") and len(arguments) > 1:
        is_range = arguments[1] in ("to", "-", "and", "–", "by", "x") and len(arguments) > 3
        return " ".join(arguments[:4] if is_range else arguments[:2]).replace(" - ", "–")
    if name == "as of" and arguments:
        return f"{'as' if node.has('lc') else 'As'} of {arguments[0]}"
    if name in ("circa", "c."):
        return f"c. {arguments[0]}" if arguments else "c."
    if name in _FIRST_ARGUMENT and arguments:
        return arguments[0]
    if name in _LAST_ARGUMENT and arguments:
        return arguments[0] if "quote" in name else arguments[-1]
    return ""


def _is_running_text(line: str) -> bool:
    return bool(line.strip()) and _LIST not in line and not line.startswith(" ")


def _paragraph(text: str) -> str:
    """`text` with its holes closed, cut after its last whole sentence; empty where it is not prose."""
    if _HOLE in text:
        return ""
    for pattern, replacement in _REPAIRS:
        text = pattern.sub(replacement, text)
    whole = _PARAGRAPH_END.match(text.lstrip(" ,;:.|"))
    return whole.group() if whole and len(whole.group()) >= 40 else ""
