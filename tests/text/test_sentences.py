"""Sentence spans: the rules that hold for any text, and the cases that were decided."""

from __future__ import annotations

import random

import pytest

from planlm.text.sentences import _LINES, _TOKENIZER, STRETCH, ends_sentence, split_sentences
from tests.work import num_calls


def sentences(text: str) -> list[str]:
    return [text[start:end] for start, end in split_sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t ", []),
        ("One sentence", ["One sentence"]),
        ("First one. Second one!  Third?", ["First one.", "Second one!", "Third?"]),
        ("A heading\nIts text. More\n\n\nLast", ["A heading", "Its text.", "More", "Last"]),
        ("Windows line\r\nOld Mac line\rSeparator\u2028end", ["Windows line", "Old Mac line", "Separator", "end"]),
        ("Dr. Smith met J. R. Jones of the U.S. Navy.", ["Dr. Smith met J. R. Jones of the U.S. Navy."]),
        ("Pi is 3.14 or so. It is.", ["Pi is 3.14 or so.", "It is."]),
        ("From Sweden; Canada; and France.", ["From Sweden; Canada; and France."]),
        ("Around the Cambrian (about then), many lived.", ["Around the Cambrian (about then), many lived."]),
        ('He said "Stop." She went on.', ['He said "Stop."', "She went on."]),
        ("今日は晴れです。明日は雨です。終わり", ["今日は晴れです。", "明日は雨です。", "終わり"]),
        ("他说：“好。”然后走了！真的？", ["他说：“好。”", "然后走了！", "真的？"]),
        ("यह एक है। यह दो है।", ["यह एक है।", "यह दो है।"]),
    ],
)
def test_examples(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_spans_hold_all_text_in_order_without_white_space_around() -> None:
    alphabet = [*"aB.!1'\"();é。🙂 ", "\n", "\u200b", "\x00", "\u00a0"]
    generator = random.Random(0)
    for _ in range(500):
        text = "".join(generator.choices(alphabet, k=generator.randrange(60)))
        last = 0
        for start, end in split_sentences(text):
            assert start >= last and text[last:start].strip() == "", repr(text)
            assert text[start:end] and text[start:end] == text[start:end].strip(), repr(text)
            assert len(text[start:end].splitlines()) == 1, repr(text)
            last = end
        assert text[last:].strip() == "", repr(text)


def test_stretches_give_the_sentences_of_the_whole_line(monkeypatch: pytest.MonkeyPatch) -> None:
    alphabet = [
        *"aB.!1'\"();é。🙂 ",
        "\u200b",
        "\u00a0",
        ". A",
        "Dr. ",
        "No. 1",
        "(a. B)",
        " and went",
        " It was. Then",
    ]
    generator = random.Random(0)
    for _ in range(100):
        text = "".join(generator.choices(alphabet, k=generator.randrange(3000)))
        whole = split_sentences(text)
        with monkeypatch.context() as patch:
            patch.setattr("planlm.text.sentences.STRETCH", 2000)
            patch.setattr("planlm.text.sentences.LOOKAHEAD", 500)
            assert split_sentences(text) == whole, repr(text)


def test_lines_are_those_of_splitlines() -> None:
    generator = random.Random(0)
    for _ in range(500):
        text = "".join(generator.choices("a.\n\r\v\f\x1c\x1d\x1e\x1f\x85\u2028\u2029 ", k=generator.randrange(20)))
        assert [match.group() for match in _LINES.finditer(text) if match.group()] == text.splitlines(keepends=True)


@pytest.mark.parametrize(
    "unit", ["word ", "a", ".", ". ", "(", "\n", "Hi there.\n", "🙂", "\x00\x01", "'a", "aB", "漢字。"]
)
def test_work_is_linear(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: function calls, and the characters that syntok is given."""
    characters = []
    tokenize = _TOKENIZER.tokenize
    monkeypatch.setattr(_TOKENIZER, "tokenize", lambda text: (characters.append(len(text)), tokenize(text))[1])
    work = []
    for count in (50_000, 200_000):
        text = unit * (count // len(unit))
        characters.clear()
        work.append((num_calls(lambda text=text: split_sentences(text)), sum(characters)))
    (calls, seen), (more_calls, more_seen) = work
    assert more_calls < 6 * calls, work  # four times the text: quadratic work would be sixteen times
    assert more_seen < 6 * seen + STRETCH, work


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("It rained.", True),
        ("It rained. ", True),
        ('He said "Go."', True),
        ("Really?!", True),
        ("A heading\n", True),
        ("It rained. Then", False),
        ("It was Dr.", False),
        ("It was Dr. ", False),
        ("and so", False),
        ("", False),
        ("  ", False),
        ("\n", False),
        ("雨です。", True),
    ],
)
def test_end_of_sentence(text: str, ends: bool) -> None:
    assert ends_sentence(text) is ends
