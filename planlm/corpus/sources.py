"""The documents of all inputs: read once to find faults, and then again to be the same."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import xxhash

from planlm.corpus.inputs import Input
from planlm.corpus.readers import Document, Fields, read_part
from planlm.errors import InputError
from planlm.progress import Progress


@dataclass(frozen=True)
class Source:
    """What one input held.

    Attributes:
        input: as it was given.
        documents: their number.
        fingerprint: of their ids and texts, in order.
        skipped: files and folders left aside: hidden, of no known kind, or without a document.
    """

    input: str
    documents: int
    fingerprint: str
    skipped: int


class Documents:
    """The documents of some inputs, in order, one at a time; every iteration reads them anew.

    Args:
        inputs: of `find_inputs`, or `in_memory`.
        fields: which fields hold text and id.
        max_documents: stop after so many.

    Attributes:
        hashes: of id and text of every document, uint64 [documents], from `scan`.

    Raises:
        InputError: while reading, as `read_part`, for an input without documents, and where a document
            is not the one that `scan` saw.
    """

    def __init__(self, inputs: Sequence[Input], fields: Fields, max_documents: int | None = None) -> None:
        self.inputs = inputs
        self._fields, self._max_documents = fields, max_documents
        self.hashes: np.ndarray | None = None
        self._empty: dict[str, list[str]] = {}

    def __iter__(self) -> Iterator[Document]:
        where = ""
        number = 0
        for found in self.inputs:
            for document in self._read(found, number):
                where = document.where
                if self.hashes is not None and (
                    number == len(self.hashes) or content_hash(document) != self.hashes[number]
                ):
                    raise _changed(where)
                yield document
                number += 1
        if self.hashes is not None and number < len(self.hashes):
            raise _changed(f"what follows {where or 'the beginning'}")

    def scan(self) -> list[Source]:
        """Read everything once, so that every fault is found before hours of encoding; later readings are held to it.

        Raises:
            InputError: also for an id that two documents share.
        """
        contents, ids = array("Q"), array("Q")
        sources = []
        self.hashes = None
        with Progress("Reading", unit="documents") as progress:
            for found in self.inputs:
                digest = blake2b(digest_size=16)
                first = len(ids)
                for document in self._read(found, first):
                    for part in (document.id, document.text):
                        encoded = part.encode()
                        digest.update(len(encoded).to_bytes(8, "little") + encoded)
                    contents.append(content_hash(document))
                    ids.append(id_hash(document.id))
                    progress.advance()
                skipped = len(found.skipped) + len(self._empty[found.argument])
                sources.append(Source(found.argument, len(ids) - first, digest.hexdigest(), skipped))
        self.hashes = np.array(contents, dtype=np.uint64)
        self._refuse_duplicates(np.array(ids, dtype=np.uint64))
        return sources

    def left_aside(self) -> list[str]:
        """After a reading, a line for every input of which files were left aside."""
        lines = []
        for found in self.inputs:
            names = [f"{name} (hidden or of another kind)" for name in found.skipped]
            names += [f"{name} (without a document)" for name in self._empty.get(found.argument, [])]
            if names:
                more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
                lines.append(f"{found.argument}: left aside {', '.join(names[:10])}{more}")
        return lines

    def _read(self, found: Input, before: int) -> Iterator[Document]:
        """Documents of one input, of which `before` others were read; refuses one without any."""
        empty = self._empty[found.argument] = []
        left = None if self._max_documents is None else self._max_documents - before
        count = 0
        for part in found.parts:
            first = count
            for document in itertools.islice(read_part(part, self._fields), None if left is None else left - count):
                count += 1
                yield document
            if count == left:  # what follows is not read, nor its faults found
                return
            if count == first:
                empty.append(part.name)
        if not count:
            raise InputError(f"{found.argument}: holds no document")

    def _refuse_duplicates(self, hashes: np.ndarray) -> None:
        """Two documents of one id could land on both sides of a split; name them, reading again to find their rows."""
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        if not len(same):
            return
        pair = order[same[0]], order[same[0] + 1]
        first, second = (document for number, document in enumerate(self) if number in pair)
        raise InputError(
            f"{second.where}: id {second.id!r} is also that of {first.where}; make ids unique, or name another field "
            "with --id-field (one that is absent gives file name and row)"
        )


def id_hash(document_id: str) -> int:
    """A stable hash of 64 bits."""
    return int.from_bytes(blake2b(document_id.encode(), digest_size=8).digest(), "little")


def content_hash(document: Document) -> int:
    """A hash of id and text, 64 bits."""
    document_id = document.id.encode()
    return xxhash.xxh3_64_intdigest(len(document_id).to_bytes(8, "little") + document_id + document.text.encode())


def _changed(where: str) -> InputError:
    return InputError(
        f"{where}: not what it was at the first reading; run the same command again when nothing writes to the inputs"
    )
