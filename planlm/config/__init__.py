"""One dataclass per command: its fields are the configuration file's keys and the command line's flags.

Standard library only, and imported by every room: `planlm --help` must answer without importing torch, and library
functions take the same objects that the command line builds. `help` texts give units and say where a default comes
from (the papers of docs/method.md, or a measurement in dev/log.md).
"""

from planlm.config.base import (
    CONDITIONINGS,
    DEFAULT_ENCODER,
    DEFAULT_LM,
    PLANNER_INPUTS,
    CommandConfig,
    option,
    required,
)
from planlm.config.corpus import ActionsConfig, PrepareConfig
from planlm.config.evaluation import (
    AuditConfig,
    AuditProbeConfig,
    EvaluateConfig,
    EvaluateGenerationConfig,
    ReportConfig,
)
from planlm.config.generation import GenerateConfig
from planlm.config.training import LoopConfig, PlanBudgetConfig, PlannerConfig, TrainConfig
from planlm.config.whole import DoctorConfig, ExperimentConfig, QuickstartConfig, SmallLMConfig

__all__ = [
    "CONDITIONINGS",
    "DEFAULT_ENCODER",
    "DEFAULT_LM",
    "PLANNER_INPUTS",
    "ActionsConfig",
    "AuditConfig",
    "AuditProbeConfig",
    "CommandConfig",
    "DoctorConfig",
    "EvaluateConfig",
    "EvaluateGenerationConfig",
    "ExperimentConfig",
    "GenerateConfig",
    "LoopConfig",
    "PlanBudgetConfig",
    "PlannerConfig",
    "PrepareConfig",
    "QuickstartConfig",
    "ReportConfig",
    "SmallLMConfig",
    "TrainConfig",
    "option",
    "required",
]
