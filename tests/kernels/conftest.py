"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from planlm.kernels import use_backend


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend in turn, forced for the whole test."""
    with use_backend(request.param):
        yield request.param
