"""Which implementation of an operation runs: the fastest that can, or the one that was asked for.

Backends, fastest first: `triton` (CUDA), `cpp` (CPU), `reference` (anywhere, the definition). The environment variable
`PLANLM_BACKEND` forces one for the process, `use_backend` for a block of code; the innermost block wins. A forced
backend that cannot run a call raises with the reason and never falls back.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cpp, environment, operators
from .cpp import logger

BACKENDS = ("triton", "cpp", "reference")


@dataclass(frozen=True)
class Backend:
    """A compiled backend: where its operators are and which dtypes they take.

    Attributes:
        name (str): "triton" or "cpp".
        namespace (str): of its operators in `torch.ops`.
        working (torch.dtype): what a call computes in: float64, or float32.
    """

    name: str
    namespace: str
    working: torch.dtype

    @property
    def operators(self) -> Any:
        """The namespace of its operators."""
        return getattr(torch.ops, self.namespace)

    def plan_projection(self, *arguments: Any) -> Any:
        """Its `plan_projection`, of the fields of `ProjectionInputs`; the results but for what the backward needs."""
        if self.is_eager:
            from .triton_projection import PlanProjection

            *tensors, temperature, top_k, streamed = arguments
            return PlanProjection.apply(temperature, top_k, streamed, *tensors)  # type: ignore[no-untyped-call]
        return self.operators.plan_projection(*arguments)

    def add_plan(self, x: Tensor, plan: Tensor, segment_ids: Tensor, gate: Tensor | None) -> Tensor:
        """Its `add_plan`."""
        if self.is_eager:
            from .triton_addition import AddPlan

            return AddPlan.apply(x, plan, segment_ids, gate, None, 0)  # type: ignore[no-any-return, no-untyped-call]
        added: Tensor = self.operators.add_plan(x, plan, segment_ids, gate)
        return added

    def cross_entropy_(self, logits: Tensor, target: Tensor) -> Tensor:
        """Its `cross_entropy_`: the loss; the logits are the gradient then."""
        if self.is_eager:
            from . import triton_cross_entropy

            return triton_cross_entropy.cross_entropy_(logits, target)
        nll: Tensor = self.operators.cross_entropy_(logits, target)
        return nll

    @property
    def is_eager(self) -> bool:
        """Whether plain autograd functions run: on CUDA the dispatcher would take longer than a small model's work."""
        return self.name == "triton" and not torch.compiler.is_compiling()

    def matrices(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which matrices of `dtype` are multiplied: float32 where half precision would be slower."""
        if self.name == "cpp" and dtype == torch.bfloat16 and not _fast_bf16():
            dtype = torch.float32
        return self.vectors(dtype)

    def vectors(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which everything else of `dtype` is read."""
        if self.working == torch.float64 or (self.name == "cpp" and dtype == torch.float16):
            return self.working
        return dtype


# A plain module variable: torch.compile can trace and guard it, which it cannot with a ContextVar.
_forced: str | None = None
_blocks: list[tuple[object, str]] = []


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every operation called inside the block, by any thread, to run on one backend.

    Args:
        name (str): "triton", "cpp" or "reference".

    Raises:
        ValueError: for another name, here; inside the block, for a call that the backend cannot run.
    """
    global _forced
    _known(name, "use_backend")
    block = (object(), name)
    _blocks.append(block)
    _forced = name
    try:
        yield
    finally:
        _blocks.remove(block)  # blocks of several threads end in any order
        _forced = _blocks[-1][1] if _blocks else None


def choose(operation: str, device: torch.device, working: torch.dtype) -> Backend | None:
    """The backend for inputs on `device` whose computation takes `working`; None: the reference.

    Raises:
        ValueError: the forced backend cannot run this call, or is unknown.
    """
    forced = _forced or _known(environment.backend(), "PLANLM_BACKEND")
    if forced is None:
        # Triton's interpreter is for tests, which ask for it.
        usable = [name for name in BACKENDS if name != "triton" or device.type == "cuda"]
        forced = next(name for name in usable if why_not(name, operation, device, working) is None)
    elif (reason := why_not(forced, operation, device, working)) is not None:
        raise ValueError(f"backend {forced!r} was asked for, but {reason}; use 'reference' or leave it to PlanLM")
    if forced == "reference":
        return None
    # The CPU's implementation under planlm:: is the C++ one.
    namespace = "planlm_interpreted" if forced == "triton" and device.type == "cpu" else "planlm"
    return Backend(forced, namespace, working)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside an operation: it decides its dtypes itself."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def why_not(backend: str, operation: str, device: torch.device, working: torch.dtype) -> str | None:
    """Why `backend` cannot run `operation` on `device`, computing in `working`; None where it can."""
    if backend == "cpp":
        return _no_cpp() if device.type == "cpu" else f"{operation} on {device.type} has no cpp implementation"
    if backend == "triton":
        if working == torch.float64:
            return f"{operation} has no triton implementation in float64"
        return _no_triton(device.type, device.index)
    return None


def constant(function: Any) -> Any:
    """Have torch.compile ask once per compilation: it cannot trace what compiles or imports a backend.

    What torch.compiler.assume_constant_result does, without importing the compiler, which takes more than a second.
    """
    function._dynamo_marked_constant = True
    return function


@constant
def _no_cpp() -> str | None:
    return cpp.why_not()


_fast_bf16 = constant(cpp.fast_bf16)


@constant
def _no_triton(device: str, index: int | None) -> str | None:
    return _find_triton(device, index)


@functools.cache
def _find_triton(device: str, index: int | None) -> str | None:
    reason = _triton_lacks(device, index)
    if reason is None and device == "meta":
        operators.define("planlm")
    elif reason is None:
        _register_triton(device)
    elif device == "cuda":
        logger.warning("planlm.kernels: %s; the eager reference runs instead", reason)
    return reason


def _triton_lacks(device: str, index: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device == "cpu":
        if not environment.interpreted():
            return "triton runs on a CPU only in its interpreter (TRITON_INTERPRET=1 from the start of the process)"
        return None
    if device == "meta":  # without data: shapes, and for observers what would be launched
        return None
    if device != "cuda":
        return f"triton has no {device} implementation"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return f"triton needs a GPU of compute capability 8.0, and {torch.cuda.get_device_name(index)} has less"
    if (reason := environment.no_launchers()) is not None:
        return reason
    from triton import knobs

    # Triton loads launchers and kernels from a cache of its own.
    reason = environment.not_ours(Path(knobs.cache.dir))
    return reason and f"others may put code into Triton's cache ({reason}): set TRITON_CACHE_DIR to a folder of yours"


@functools.cache
def _register_triton(device: str) -> None:
    from . import triton_addition, triton_cross_entropy, triton_projection

    library = operators.define("planlm_interpreted" if device == "cpu" else "planlm")
    for module in (triton_projection, triton_addition, triton_cross_entropy):
        for name in module.OPERATORS:
            library.impl(name, getattr(module, name), device.upper())


def _known(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, needs one of {', '.join(BACKENDS)}")
    return name
