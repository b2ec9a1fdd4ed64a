"""The joint model; importing this room registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from planlm.model.configuration import PlanLMConfig
from planlm.model.modeling import PlanLMForCausalLM, PlanLMOutput
from planlm.model.planner import Planner

__all__ = ["PlanLMConfig", "PlanLMForCausalLM", "PlanLMOutput", "Planner"]

AutoConfig.register(PlanLMConfig.model_type, PlanLMConfig)
AutoModelForCausalLM.register(PlanLMConfig, PlanLMForCausalLM)
