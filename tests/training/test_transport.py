"""Batches on their way to a device: one buffer, one copy beside the training stream, and nobody who waits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from planlm.corpus.batches import PlanBatch, PlanLoader, SentenceLoader
from planlm.corpus.store import PreparedCorpus
from planlm.plan_inputs import Movable
from planlm.training.prefetch import Prefetch
from planlm.training.transport import ALIGNMENT, Transport, packed, unpacked


def tensors(batch: Movable) -> list[Tensor]:
    found: list[Tensor] = []
    batch.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def new(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


@pytest.fixture
def batches(planted: dict[str, str]) -> list[Movable]:
    """One of each kind, with every field that a loader gives."""
    split = PreparedCorpus.load(planted["corpus"]).split("train")
    plain = PlanLoader(split, window=16, batch_size=3, pack=True, with_others=True)
    plain.horizon = 3
    loaders: tuple[Any, ...] = (plain, SentenceLoader(split, batch_size=2, own_embeddings=True))
    whole = [next(iter(loader)) for loader in loaders]
    return [*whole, *(batch.unscored() for batch in whole)]  # the last one has a tensor without an element


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_batch_is_one_buffer(device: str, batches: list[Movable]) -> None:
    for batch in batches:
        buffer = packed(batch, new).to(device)
        again = unpacked(batch, buffer)
        assert type(again) is type(batch)
        assert len(tensors(again)) == len(tensors(batch))
        for mine, wanted in zip(tensors(again), tensors(batch), strict=True):
            assert (mine.dtype, mine.shape, mine.device.type) == (wanted.dtype, wanted.shape, device)
            assert mine.untyped_storage()._cdata == buffer.untyped_storage()._cdata or device == "meta"
            assert mine.storage_offset() * mine.itemsize % ALIGNMENT == 0 and mine.is_contiguous()
            assert device == "meta" or torch.equal(mine, wanted)
        if isinstance(batch, PlanBatch):
            assert again.plan.most_segments == batch.plan.most_segments


def test_tensors_of_all_kinds_find_their_place() -> None:
    """Of odd sizes, strided, empty and of no dimension."""

    class Kinds(Movable):
        def __init__(self, **values: Any) -> None:
            vars(self).update(values)

    kinds = Kinds(
        flags=torch.tensor([True, False, True]), none=None, half=torch.randn(3, 5).bfloat16(), name="as it is",
        number=torch.tensor(7), strided=torch.randn(4, 6).t(), empty=torch.zeros(0, 2, dtype=torch.int64),
        inner=Kinds(ids=torch.arange(5, dtype=torch.int32)),
    )  # fmt: skip
    again = unpacked(kinds, packed(kinds, new))
    assert again.none is None and again.name == "as it is"
    assert all(torch.equal(*pair) for pair in zip(tensors(again), tensors(kinds), strict=True))


def test_a_cpu_gets_what_the_loader_made(batches: list[Movable]) -> None:
    transport = Transport(torch.device("cpu"))
    for batch in (*batches, (batches[0], batches[1])):
        assert transport.receive(transport.send(batch)) is batch


class Streams:
    """torch.cuda as far as `Transport` uses it: what is asked of it, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.current = "training"
        asked = self.asked

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wait_event(self, event: Any) -> None:
                asked.append(f"{self.name} waits for the event behind {event.behind}")

        class Event:
            behind = ""

            def record(self, stream: Stream) -> None:
                self.behind = stream.name

        @contextlib.contextmanager
        def stream(of: Stream) -> Iterator[None]:
            before, self.current = self.current, of.name
            yield
            self.current = before

        empty, to = torch.empty, Tensor.to

        def pinned(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
            asked.append(f"{'pinned' if pin_memory else 'pageable'} memory in {self.current}")
            return empty(*size, **options)

        def copy(tensor: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
            if device != torch.device("cuda", 3):
                return to(tensor, device)
            asked.append(f"{'asynchronous' if non_blocking else 'blocking'} copy in {self.current}")
            return tensor.clone()

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("training"))
        monkeypatch.setattr(torch, "empty", pinned)
        monkeypatch.setattr(Tensor, "to", copy)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: asked.append(f"held for {stream.name}"))


def test_a_gpu_gets_one_copy_in_a_stream_of_its_own(planted: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    split = PreparedCorpus.load(planted["corpus"]).split("train")
    loader, other = (PlanLoader(split, window=16, batch_size=3) for _ in range(2))
    wanted = list(islice(other, 2))
    streams = Streams(monkeypatch)
    transport = Transport(torch.device("cuda", 3))
    sending = ["pinned memory in side", "asynchronous copy in side"]
    receiving = ["training waits for the event behind side", "held for training"]
    first = transport.receive(transport.send(wanted[0]))
    assert streams.asked == [*sending, *receiving]
    assert all(torch.equal(*pair) for pair in zip(tensors(first), tensors(wanted[0]), strict=True))
    streams.asked.clear()
    pair = transport.receive(transport.send((wanted[0], wanted[1])))
    assert streams.asked == [*sending, *sending, *receiving, *receiving]
    assert isinstance(pair, tuple) and all(isinstance(batch, PlanBatch) for batch in pair)
    with Prefetch(loader, ahead=2, transport=transport) as batches:
        for batch in wanted:
            found = next(batches)
            assert all(torch.equal(*pair) for pair in zip(tensors(found), tensors(batch), strict=True))
