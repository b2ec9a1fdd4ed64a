"""Several processes under `torchrun`: who is who, and the few things they say to each other.

Without torchrun there is one process, rank 0, and nothing is sent. Everything here is called by all ranks in the same
order, as collectives are.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

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

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Of what all do together, a step say. Between two such things a rank may compile the LM, which takes minutes, or write
its file of a checkpoint: 100 GB at 100 MB/s take 17 minutes. Who is dead or frozen `Heartbeat` notices long before."""

RANK_ZERO_TIMEOUT = timedelta(days=7)
"""Of waiting for one that works alone (measuring, clustering, writing); a frozen one is noticed by `Heartbeat`."""

_slow_group: dist.ProcessGroup | None = None
"""All processes once more, to wait for each other `RANK_ZERO_TIMEOUT` long and to exchange what no device knows."""


class RankZeroFailed(SystemExit):
    """Raised on every other rank where one failed, mostly the first: that one says what is wrong."""


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Connect the processes that torchrun started, by NCCL where there is CUDA and else by gloo; part again at the end.

    Also leaves a connection that exists as it is, and does nothing where there is one process.

    Raises:
        InputError: what torchrun says in the environment cannot be, or two processes would share a CUDA device.
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
        if where.type == "cuda":
            check_devices(store, number, size, f"{platform.node()}, {torch.cuda.get_device_properties(where).uuid}")
        # With the device NCCL connects now, and says now what is wrong; without, it guesses it from the rank.
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo",
            store=store,
            rank=number,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=where if where.type == "cuda" else None,
        )
        _slow_group = dist.new_group(backend="gloo", timeout=RANK_ZERO_TIMEOUT)
    except InputError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise MachineError(f"not all {world_size()} processes have met at {host}:{port} ({reason})") from error
    try:
        with Heartbeat(host, port):
            yield
    finally:
        _slow_group = None
        dist.destroy_process_group()


def check_devices(store: Any, number: int, size: int, mine: str) -> None:
    """Refuse that two processes share a device: NCCL would fail with a page, or wait for ever.

    Args:
        store: of all processes.
        number, size: this process's rank, and how many there are.
        mine: names this process's device among those of all machines.

    Raises:
        InputError: on the first of them that shares one.
        RankZeroFailed: on the others.
    """
    store.set(f"planlm/device/{number}", mine)
    devices = [store.get(f"planlm/device/{other}").decode() for other in range(size)]
    for other, given in enumerate(devices):
        if (first := devices.index(given)) < other:
            if number != first:
                raise RankZeroFailed(2)
            raise InputError(
                f"processes {first} and {other} were given the same GPU ({given}); start at most one process for each "
                "GPU of a machine, with torchrun, which sets LOCAL_RANK"
            )


def on_rank_zero(action: Callable[[], Result]) -> Result | None:
    """Run `action` on the first rank while the others wait, for however long; they get None.

    Raises:
        RankZeroFailed: on the others, where it failed on the first, which raises what it raised.
    """
    if world_size() == 1:
        return action()
    failed = _said(0)
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


def _said(*numbers: float) -> Tensor:
    """float64, what the hosts say to each other: past the devices, whose work nobody has to wait for then."""
    return torch.tensor(numbers, dtype=torch.float64, device=CPU if _slow_group is not None else device())


def barrier() -> None:
    """Go on when all ranks are here, however much longer than this one the others work."""
    if world_size() > 1:
        dist.all_reduce(_said(0), group=_slow_group)


def all_reduce(values: Tensor) -> Tensor:
    """Sum over all ranks, in place, of what lies on the device; no host waits for it."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_reduce_sum(*numbers: float) -> list[float]:
    """Sums over all ranks of numbers that the hosts have: they wait for each other, and not for their devices."""
    if world_size() == 1:
        return list(numbers)
    said = _said(*numbers)
    dist.all_reduce(said, group=_slow_group)
    found: list[float] = said.tolist()
    return found


def broadcast_text(text: str | None) -> str:
    """What the first rank says; the others give None."""
    said = (text or "").encode()
    length = int(all_reduce_sum(len(said))[0])
    return bytes(map(int, all_reduce_sum(*(said or bytes(length))))).decode()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return all_reduce_sum(flag)[0] > 0
