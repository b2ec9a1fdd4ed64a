"""Sentence boundaries as character spans.

syntok decides (F1 .940 on Brown at some 6,000 sentences/s; the sentence encoder behind it manages a few hundred), line
by line, since a newline always ends a sentence and since syntok pads every paragraph with the length of the text
before it, which is quadratic. Two rules are ours: a boundary needs a terminal mark before it (syntok also splits at
semicolons and before some brackets, which breaks lists of names apart), and the full stops of scripts without
spaces end a sentence (syntok looks for marks at the ends of words only).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from syntok.segmenter import segment
from syntok.tokenizer import Tokenizer

_TOKENIZER = Tokenizer(replace_not_contraction=False)
_CLOSING = r"\"'´’”»›」』】〉》）)\]}*_"
_MARKS = ".!?…‼‽⁇⁈⁉。！？｡．।॥؟۔"
_TERMINATED = re.compile(rf"[{_MARKS}][{_CLOSING}.!?…]*$")
_LAST = re.compile(rf"[{_MARKS}{_CLOSING}]$")
_LINES = re.compile(r"[^\n\r\v\f\x1c-\x1e\x85\u2028\u2029]*(?:\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]|$)")
"""What `str.splitlines` finds, one at a time; and an empty one at the end."""

_UNSPACED = re.compile(rf"[。！？｡।॥؟۔]+[{_CLOSING}]*")

STRETCH = 20_000
"""Characters of a line that syntok sees at a time."""

LOOKAHEAD = 1_000
"""Characters behind a boundary on which it may depend: syntok looks a few words ahead, and into short brackets."""


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Split `text` into sentences.

    Args:
        text: any string; time is linear in its length.

    Returns:
        Spans (start, end) in characters, in order, without the white space around each; empty for blank text.
    """
    spans = []
    for match in _LINES.finditer(text):
        line, offset = match.group(), match.start()
        if not line.isspace():
            for start, end in _pieces(line):
                sentence = line[start:end].strip()
                if sentence:
                    start += offset + len(line[start:end]) - len(line[start:end].lstrip())
                    spans.append((start, start + len(sentence)))
    return spans


def ends_sentence(text: str) -> bool:
    """Whether a sentence boundary would stand at the end of `text` if a capitalised word followed.

    Agrees with `split_sentences` by construction. Only the last line of `text` matters, so a caller that extends one
    sentence token by token pays for that line each time.
    """
    bare = text.rstrip()
    if not bare or not may_end_sentence(text):
        return False
    if _breaks_line(text[len(bare) :]):
        return True
    line = bare.splitlines()[-1]
    return any(end == len(line) for _, end in split_sentences(f"{line} Then"))


def may_end_sentence(end: str) -> bool:
    """A quick look at the last characters of a text: False only where `ends_sentence` is False for all of it."""
    bare = end.rstrip()
    return not bare or _LAST.search(bare) is not None or _breaks_line(end[len(bare) :])


def _breaks_line(space: str) -> bool:
    return len(f".{space}.".splitlines()) > 1


def _pieces(line: str) -> list[tuple[int, int]]:
    """Spans that cover `line`, one a sentence, white space included."""
    pieces = []
    start = 0
    for cut in _cuts(line):
        if start < cut < len(line) and _TERMINATED.search(line[max(start, cut - 40) : cut].rstrip()):
            pieces.append((start, cut))
            start = cut
    pieces.append((start, len(line)))
    return pieces


def _cuts(line: str) -> Iterator[int]:
    """Where sentences may begin, in order.

    syntok keeps all words of a sentence, some 90 bytes for each character, so it sees a long line in stretches: each
    begins at the last boundary that the end of the one before cannot have moved, where syntok begins anew in any case,
    or, where there is none, at a space.
    """
    begin = 0
    while True:
        stretch = line[begin : begin + STRETCH]
        own = {sentence[0].offset for sentence in segment(_TOKENIZER.tokenize(stretch)) if sentence}
        unspaced = {match.end() for match in _UNSPACED.finditer(stretch)}
        last = len(stretch) if begin + len(stretch) == len(line) else STRETCH - LOOKAHEAD
        yield from (begin + cut for cut in sorted(own | unspaced) if cut <= last)
        if last == len(stretch):
            return
        for cuts in (own, unspaced, {stretch.rfind(" ", 0, last)}, {last}):
            if (cut := max((cut for cut in cuts if cut <= last), default=0)) > 0:
                begin += cut
                break
