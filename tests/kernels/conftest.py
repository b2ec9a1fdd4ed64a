"""Fixtures of the kernel tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from planlm.kernels import cpp, environment, projection, use_backend

# Triton runs on a CPU in its interpreter only, which a process has from its start or not at all (test_triton.py).
INTERPRETED = environment.interpreted()
ON_TRITON = INTERPRETED or "PLANLM_TEST_DEVICE" in os.environ
BACKENDS = ["triton, composed", "triton, streamed"] if ON_TRITON else ["reference", "cpp"]


def operators() -> Any:
    """Triton's operators as torch.compile sees them."""
    return torch.ops.planlm_interpreted if INTERPRETED else torch.ops.planlm


@pytest.fixture(autouse=True, scope="session")
def _device() -> Iterator[None]:
    """Where tensors are: PLANLM_TEST_DEVICE, the CPU by default."""
    torch.set_default_device(os.environ.get("PLANLM_TEST_DEVICE"))
    yield
    torch.set_default_device(None)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every backend in turn, and form, forced for the whole test; without a compiler the reference alone."""
    name, _, form = request.param.partition(", ")
    if name == "cpp" and (reason := cpp.why_not()) is not None:
        pytest.skip(reason)
    if form:
        monkeypatch.setattr(projection, "STREAMED_BYTES", 0 if form == "streamed" else 1 << 60)
    with use_backend(name):
        yield name


@pytest.fixture(autouse=ON_TRITON)
def _poison() -> Iterator[None]:
    """Every tensor that is allocated without values starts as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=not INTERPRETED)
    yield
    torch.use_deterministic_algorithms(False)
