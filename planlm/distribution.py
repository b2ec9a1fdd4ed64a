"""Several processes under `torchrun`: who is who, and the few things they say to each other.

Without torchrun there is one process, rank 0, and nothing is sent. Everything here is called by all ranks in the same
order, as collectives are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from planlm.precision import device

Result = TypeVar("Result")


class OtherRankFailed(SystemExit):
    """Raised on every other rank where the first one failed: that one says what is wrong."""


def num_ranks() -> int:
    """Processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Connect the processes that torchrun started, by NCCL where there is CUDA and else by gloo; part again at the end.

    Also leaves a connection that exists as it is, and does nothing where there is one process.
    """
    if num_ranks() == 1 or dist.is_initialized():
        yield
        return
    where = device()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    # The first rank may work alone for long (measuring a planner, writing a model) while the others wait for it.
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    try:
        yield
    finally:
        dist.destroy_process_group()


def first_rank_does(action: Callable[[], Result]) -> Result | None:
    """Run `action` on the first rank while the others wait; they get None.

    Raises:
        OtherRankFailed: on the others, where it failed on the first, which raises what it raised.
    """
    if num_ranks() == 1:
        return action()
    failed = torch.zeros(1, device=device())
    result, error = None, None
    if rank() == 0:
        try:
            result = action()
        except BaseException as raised:
            error = raised
            failed += 1
    dist.broadcast(failed, 0)
    if error is not None:
        raise error
    if failed.item():
        raise OtherRankFailed(2)
    return result


def total(values: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if num_ranks() > 1:
        dist.all_reduce(values)
    return values


def counted(*numbers: float) -> list[float]:
    """Sums of these numbers over all ranks."""
    return (
        list(numbers)
        if num_ranks() == 1
        else total(torch.tensor(numbers, dtype=torch.float64, device=device())).tolist()
    )


def told(text: str | None) -> str:
    """What the first rank says; the others give None."""
    said = (text or "").encode()
    length = int(counted(len(said))[0])
    return bytes(map(int, counted(*(said or bytes(length))))).decode()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return counted(flag)[0] > 0
