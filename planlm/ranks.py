"""Which of several processes this is: what torchrun says in the environment, checked.

Without torchrun there is one process, whatever else is set. Standard library only, for the command line.
"""

from __future__ import annotations

import os

from planlm.errors import InputError


def world_size() -> int:
    """Processes of this run (WORLD_SIZE).

    Raises:
        InputError: not a number of processes; likewise of the functions below.
    """
    return _whole("WORLD_SIZE", 1, 1, 1_000_000)


def rank() -> int:
    """Number of this process, from 0 (RANK)."""
    return _whole("RANK", None, 0, world_size() - 1) if world_size() > 1 else 0


def local_rank() -> int:
    """Number of this process on its machine, from 0 (LOCAL_RANK): that of its device."""
    return _whole("LOCAL_RANK", 0, 0, 1_000_000)


def local_world_size() -> int:
    """Processes of this run on this machine (LOCAL_WORLD_SIZE)."""
    return _whole("LOCAL_WORLD_SIZE", 1, 1, 1_000_000)


def master_address() -> tuple[str, int]:
    """Where the processes meet (MASTER_ADDR, MASTER_PORT)."""
    host = os.environ.get("MASTER_ADDR", "").strip()
    if not host:
        raise InputError("MASTER_ADDR is not set though WORLD_SIZE is; start several processes with torchrun")
    return host, _whole("MASTER_PORT", None, 1, 65535)


def _whole(name: str, default: int | None, least: int, most: int) -> int:
    text = os.environ.get(name) or ("" if default is None else str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 7 or not least <= int(text) <= most:
        given = f"{name}={text[:40]!a}" if text else f"{name} is not set though WORLD_SIZE is"
        raise InputError(
            f"{given}: expected a number from {least} to {most}; start several processes with torchrun, or unset it"
        )
    return int(text)
