"""transformers' own tests of a model, on tiny joint models over two LM families.

Collected by `python -m tests.conformance`, which has put transformers' test folder on the path as `transformers_tests`;
its name keeps it out of an ordinary run of the tests.
"""

from __future__ import annotations

import copy
import unittest
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin

from planlm.model import PlanLMConfig, PlanLMForCausalLM

# By this name the tests know that the model takes labels.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[PlanLMConfig.model_type] = PlanLMForCausalLM.__name__


class Sizes:
    """What transformers' tests ask for: sizes, and a configuration with inputs. Without an encoder and a tokenizer the
    model plans a text as one sentence."""

    batch_size, seq_length, vocab_size, is_training = 7, 7, 99, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, model_type: str, **shape: Any) -> None:
        self.text_config = AutoConfig.for_model(
            model_type,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **shape,
        )

    def get_config(self) -> PlanLMConfig:
        return PlanLMConfig(
            text_config=copy.deepcopy(self.text_config),
            num_actions=6,
            action_dim=16,
            planner_layers=1,
            planner_heads=2,
            planner_dropout=0.0,
            conditioned_layers=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[PlanLMConfig, dict[str, torch.Tensor]]:
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class _Family(ModelTesterMixin, GenerationTesterMixin):
    all_model_classes = (PlanLMForCausalLM,)


class GPT2Test(_Family, unittest.TestCase):
    def setUp(self) -> None:
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        self.model_tester = Sizes("gpt2", **dropout)


class LlamaTest(_Family, unittest.TestCase):
    def setUp(self) -> None:
        self.model_tester = Sizes("llama", intermediate_size=64, num_key_value_heads=2)
