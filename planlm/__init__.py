"""PlanLM: planner-conditioned language models, trained end to end.

Importing it is cheap and imports no torch. The Auto classes of transformers learn about PlanLM's model when
transformers' own registry is imported, before or after this package.
"""

from __future__ import annotations

from types import ModuleType

import wrapt

from planlm.api import audit, audit_probe, evaluate, generate, plan_budget, prepare, pretrain_planner, train

__version__ = "0.1.0"
__all__ = [
    "audit",
    "audit_probe",
    "evaluate",
    "generate",
    "plan_budget",
    "prepare",
    "pretrain_planner",
    "train",
]


def _register(_: ModuleType) -> None:
    """Let `AutoConfig` and `AutoModelForCausalLM` load PlanLM folders: importing the room registers its classes."""
    import planlm.model  # noqa: F401


wrapt.when_imported("transformers.models.auto.modeling_auto")(_register)
