"""Several processes under `torchrun`: who is who, and the few things they say to each other.

Without torchrun there is one process, rank 0, and nothing is sent. Everything here is called by all ranks in the same
order, as collectives are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from planlm.errors import InputError, MachineError
from planlm.heartbeat import Heartbeat
from planlm.precision import CPU, device
from planlm.ranks import local_rank, master_address
from planlm.ranks import rank as rank
from planlm.ranks import world_size as world_size

Result = TypeVar("Result")

RENDEZVOUS_TIMEOUT = timedelta(minutes=15)
"""Until all processes have come: importing torch from a busy disk takes minutes."""

COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""Of what all do together, a step say: the first one compiles, which takes minutes."""

RANK_ZERO_TIMEOUT = timedelta(days=7)
"""Of waiting for one that works alone (measuring, clustering, writing); a frozen one is noticed by `Heartbeat`."""

_slow_group: dist.ProcessGroup | None = None
"""All processes once more, to wait for each other `RANK_ZERO_TIMEOUT` long."""


class RankZeroFailed(SystemExit):
    """Raised on every other rank where the first one failed: that one says what is wrong."""


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Connect the processes that torchrun started, by NCCL where there is CUDA and else by gloo; part again at the end.

    Also leaves a connection that exists as it is, and does nothing where there is one process.

    Raises:
        InputError: what torchrun says in the environment cannot be.
        MachineError: not all processes have come.
    """
    global _slow_group
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    host, port = master_address()
    where = device()
    if where.type == "cuda":
        if local_rank() >= torch.cuda.device_count():
            raise InputError(
                f"LOCAL_RANK={local_rank()}: this machine has {torch.cuda.device_count()} CUDA devices; start at most "
                "as many processes on it"
            )
        torch.cuda.set_device(where)
    try:
        store, number, size = next(iter(rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT)))
        backend = "nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=COLLECTIVE_TIMEOUT)
        _slow_group = dist.new_group(backend="gloo", timeout=RANK_ZERO_TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise MachineError(f"not all {world_size()} processes have met at {host}:{port} ({reason})") from error
    try:
        with Heartbeat(host, port):
            yield
    finally:
        _slow_group = None
        dist.destroy_process_group()


def on_rank_zero(action: Callable[[], Result]) -> Result | None:
    """Run `action` on the first rank while the others wait, for however long; they get None.

    Raises:
        RankZeroFailed: on the others, where it failed on the first, which raises what it raised.
    """
    if world_size() == 1:
        return action()
    failed = _zero()
    if rank() > 0:
        dist.broadcast(failed, 0, group=_slow_group)
        if failed.item():
            raise RankZeroFailed(2)
        return None
    try:
        return action()
    except BaseException:
        failed += 1
        raise
    finally:
        dist.broadcast(failed, 0, group=_slow_group)


def _zero() -> Tensor:
    """What the ranks say to each other where they may have to wait."""
    return torch.zeros(1, device=CPU if _slow_group is not None else device())


def barrier() -> None:
    """Go on when all ranks are here, however much longer than this one the others work."""
    if world_size() > 1:
        dist.all_reduce(_zero(), group=_slow_group)


def all_reduce(values: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_reduce_sum(*numbers: float) -> list[float]:
    """Sums of these numbers over all ranks."""
    if world_size() == 1:
        return list(numbers)
    return all_reduce(torch.tensor(numbers, dtype=torch.float64, device=device())).tolist()


def broadcast_text(text: str | None) -> str:
    """What the first rank says; the others give None."""
    said = (text or "").encode()
    length = int(all_reduce_sum(len(said))[0])
    return bytes(map(int, all_reduce_sum(*(said or bytes(length))))).decode()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return all_reduce_sum(flag)[0] > 0
