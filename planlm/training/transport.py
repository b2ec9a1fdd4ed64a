"""Batches on their way to a GPU, beside the training that goes on there: one copy each, for which nobody waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from planlm.plan_inputs import Movable

ALIGNMENT = 16
"""Bytes: where each tensor of a buffer begins. The widest load of a kernel takes so many, from a multiple of them."""


class Sent(NamedTuple):
    """A batch whose copy has been asked for.

    Attributes:
        batch: views into `buffer`.
        buffer: uint8, on the device.
        arrived: event behind the copy.
    """

    batch: Any
    buffer: Tensor
    arrived: Any


class Transport:
    """Brings what a loader makes to a device. To a CPU it has no way to go: it is handed on as it is.

    The loader's thread packs a batch into one page-locked buffer and has the GPU copy it in a stream of its own; the
    training stream waits for that copy, the host for nothing. On the device the batch's tensors are views of one
    buffer, which lives as long as any of them.

    Args:
        device: where batches are wanted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, made: Any) -> Any:
        """What `receive` takes of a batch, or of a tuple of batches; called by the loader's thread."""
        if self._stream is None:
            return made
        if isinstance(made, tuple):
            return tuple(map(self.send, made))
        # The stream's context is that of its device too: a thread begins on device 0 and would wake that up.
        with torch.cuda.stream(self._stream):
            held = packed(made, lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True))
            buffer = held.to(self._device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return Sent(unpacked(made, buffer), buffer, arrived)

    def receive(self, sent: Any) -> Any:
        """The batch that was sent, for use in the current stream; called by the thread that trains."""
        if self._stream is None:
            return sent
        if isinstance(sent, Sent):
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(sent.arrived)
            sent.buffer.record_stream(stream)  # or its memory would be the side stream's again as soon as it is let go
            return sent.batch
        return tuple(map(self.receive, sent))


def packed(batch: Movable, new: Callable[[int], Tensor]) -> Tensor:
    """The tensors of a batch behind each other in one uint8 buffer, which `new` makes of its size in bytes."""
    tensors = batch.tensors()
    buffer = new(sum(map(_room, tensors)))
    begin = 0
    for tensor in tensors:
        _view(buffer, begin, tensor).copy_(tensor)
        begin += _room(tensor)
    return buffer


def unpacked(batch: Movable, buffer: Tensor) -> Any:
    """`batch` with views into a buffer, on whatever device, that `packed` filled with its tensors or with such."""
    begin = 0

    def view(tensor: Tensor) -> Tensor:
        nonlocal begin
        begin += _room(tensor)
        return _view(buffer, begin - _room(tensor), tensor)

    return batch.map(view)


def _room(tensor: Tensor) -> int:
    """Bytes of a tensor, up to where the next one may begin."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _view(buffer: Tensor, begin: int, like: Tensor) -> Tensor:
    return buffer[begin : begin + like.nbytes].view(like.dtype).view(like.shape)
