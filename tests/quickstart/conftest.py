"""The planted corpus of the training tests serves here too."""

from tests.training.conftest import planted

__all__ = ["planted"]
