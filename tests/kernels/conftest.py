"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from planlm.kernels import cpp, environment, use_backend

# Triton runs on a CPU in its interpreter only, which a process has from its start or not at all (test_triton.py).
INTERPRETED = environment.interpreted()
BACKENDS = ["triton"] if INTERPRETED else ["reference", "cpp"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend in turn, forced for the whole test; without a compiler the reference alone."""
    if request.param == "cpp" and (reason := cpp.why_not()) is not None:
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=INTERPRETED)
def _poison() -> Iterator[None]:
    """Every tensor that is allocated without values starts as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
