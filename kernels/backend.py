"""Which implementation of an operation runs: the fastest that can, or the one that was asked for.

Backends, fastest first: `triton` (CUDA), `cpp` (CPU), `reference` (anywhere, the definition). The environment variable
`PLANLM_BACKEND` forces one for the process, `use_backend` for a block of code; the innermost block wins. A forced
backend that cannot run a call raises with the reason and never falls back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import reference

BACKENDS = ("triton", "cpp", "reference")

# A plain module variable: torch.compile can trace and guard it, which it cannot with a ContextVar.
_forced: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every operation called inside the block, by any thread, to run on one backend.

    Args:
        name (str): "triton", "cpp" or "reference".

    Raises:
        ValueError: for another name, here; inside the block, for a call that the backend cannot run.
    """
    global _forced
    outer, _forced = _forced, _known(name, "use_backend")
    try:
        yield
    finally:
        _forced = outer


def choose(operation: str, sample: Tensor) -> Callable[..., Any]:
    """The implementation of `operation` for inputs like `sample` (its device and dtype decide).

    Raises:
        ValueError: the forced backend cannot run this call, or is unknown.
    """
    forced = _forced or _known(os.environ.get("PLANLM_BACKEND") or None, "PLANLM_BACKEND")
    if forced is not None:
        reason = why_not(forced, operation, sample)
        if reason is not None:
            raise ValueError(f"backend {forced!r} was asked for, but {reason}; use 'reference' or leave it to PlanLM")
    return getattr(reference, operation)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside an operation: it decides its dtypes itself."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def why_not(backend: str, operation: str, sample: Tensor) -> str | None:
    """Why `backend` cannot run `operation` on inputs like `sample`; None where it can."""
    if backend == "reference":
        return None
    return f"{operation} on {sample.device.type} has no {backend} implementation in this version"


def _known(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, needs one of {', '.join(BACKENDS)}")
    return name
