"""The joint model; importing this room registers it with transformers' Auto classes."""

from types import ModuleType

import wrapt
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from planlm.model.configuration import PlanLMConfig
from planlm.model.families import OUTPUT_PROJECTIONS
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.output import PlanLMOutput
from planlm.model.planner import Planner

__all__ = ["PlanLMConfig", "PlanLMForCausalLM", "PlanLMOutput", "Planner"]

AutoConfig.register(PlanLMConfig.model_type, PlanLMConfig)
AutoModelForCausalLM.register(PlanLMConfig, PlanLMForCausalLM)
# Trainer's label smoothing takes a model that is not named here for one whose labels are not to be shifted.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[PlanLMConfig.model_type] = PlanLMForCausalLM.__name__


def _teach_peft(constants: ModuleType) -> None:
    """peft's default target modules: those of the supported families, whose names are found in one LM only."""
    for name, mapping in vars(constants).items():
        if name.endswith("_TARGET_MODULES_MAPPING") and isinstance(mapping, dict):
            families = [mapping[family] for family in OUTPUT_PROJECTIONS if family in mapping]
            mapping[PlanLMConfig.model_type] = sorted({target for targets in families for target in targets})


wrapt.when_imported("peft.utils.constants")(_teach_peft)
