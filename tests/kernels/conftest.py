"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from planlm.kernels import cpp, environment, projection, use_backend

# Triton runs on a CPU in its interpreter only, which a process has from its start or not at all (test_triton.py).
INTERPRETED = environment.interpreted()
BACKENDS = ["triton, composed", "triton, streamed"] if INTERPRETED else ["reference", "cpp"]


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


@pytest.fixture(autouse=INTERPRETED)
def _poison() -> Iterator[None]:
    """Every tensor that is allocated without values starts as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
