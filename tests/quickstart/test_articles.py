"""The embedded articles: prose comes out, wiki markup does not."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest

from planlm.errors import InputError
from planlm.quickstart.articles import articles, plain_text

LONG = "A sentence that is certainly long enough to be kept as prose."


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        (
            "'''Achilles''' ({{IPAc-en|ə}}; {{lang-grc|x}}) was a [[Greek mythology|Greek]] hero of Troy.",
            "Achilles was a Greek hero of Troy.",
        ),
        (
            "It is {{convert|1300|mi|km}} long,<ref name=a>no</ref> and {{nowrap|very}} old&nbsp;– they say.",
            "It is 1300 mi long, and very old – they say.",
        ),
        (
            "The river [[File:A.jpg|thumb|a [[b]] c]]is one of the longest on Earth.",
            "The river is one of the longest on Earth.",
        ),
        (
            "It was ''[[Iliad]]'' ([http://x.org an essay]), with H<sub>2</sub>O in it.",
            "It was Iliad (an essay), with H2O in it.",
        ),
        (
            "Known as {{lang|grc|ἀναρχία}}, a word<!-- hidden --> without rulers at all.",
            "Known as ἀναρχία, a word without rulers at all.",
        ),
    ],
)
def test_markup_becomes_prose(markup: str, expected: str) -> None:
    assert plain_text(f"{markup} {LONG}") == f"{expected} {LONG}"


def test_structure_is_dropped_and_paragraphs_are_kept() -> None:
    markup = f"""{{{{Infobox|name=A|list=
* not this
}}}}
{LONG}
It goes on in the next line of the markup.

{{| class="wikitable"
|-
| a cell that is long enough to be mistaken for a paragraph.
|}}
== History ==
* A list item that is long enough to be mistaken for a paragraph.
: An indented one that is long enough to be mistaken for a paragraph.
{LONG} These are the reasons:

A formula <math>x^2</math> stands in this paragraph, so it is left out.
== See also ==
{LONG}
"""
    assert plain_text(markup) == f"{LONG} It goes on in the next line of the markup.\n{LONG}"


def test_articles_are_long_clean_prose_and_do_not_import_gensim() -> None:
    if importlib.util.find_spec("gensim") is None:
        pytest.skip("gensim, whose wheel holds the articles, is not installed")
    found = list(articles())
    assert "gensim" not in sys.modules
    assert len(found) > 90
    assert len({article["id"] for article in found}) == len(found)
    words = sum(len(article["text"].split()) for article in found)
    assert 380_000 < words < 410_000
    leftovers = re.compile(r"\[\[|\]\]|\{\{|\}\}|'''|</?ref|\(\s*[;,)]|&nbsp;| ,|==")
    for article in found:
        assert not leftovers.search(article["text"]), (article["title"], leftovers.search(article["text"]))


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        next(articles())
