"""Fixtures of the kernel tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from planlm.kernels import cpp, use_backend

# Triton runs on a CPU in its interpreter only, which a process has from its start or not at all (test_triton.py).
BACKENDS = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["reference", "cpp"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend in turn, forced for the whole test; without a compiler the reference alone."""
    if request.param == "cpp" and (reason := cpp.why_not()) is not None:
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param
