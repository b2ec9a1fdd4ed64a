"""Tiny joint models over both kinds of tokenizers, for tests of the model in others' hands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planlm.model import PlanLMForCausalLM

FAMILIES = ("gpt2", "llama")
TEXTS = (
    "The cat sat on the mat. It was warm there. Rain fell on the harbour.",
    "Boats stayed in. The town had a mill, a school and a church.",
    "Was he late? Nobody knew. Nobody asked. He traded wool with Norway for three days.",
    "In 1905 the café was 3.5 km from St. Mary. It was full of songs.",  # token by token, "3." ends a sentence
)
A, K = 16, 7


def joint(lm: str, encoder: object, **options: Any) -> PlanLMForCausalLM:
    """A tiny random model with a loud plan and without dropout, in evaluation mode."""
    torch.manual_seed(0)
    model = PlanLMForCausalLM.from_lm(lm, torch.randn(K, A), conditioned_layers=2, **options)
    nn.init.normal_(model.adapter.weight)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.encoder = encoder  # type: ignore[assignment]
    return model.eval()


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, lm_folder: Callable[[str], str], encoder: object) -> PlanLMForCausalLM:
    return joint(lm_folder(request.param), encoder)


@pytest.fixture
def gpt2(lm_folder: Callable[[str], str], encoder: object) -> PlanLMForCausalLM:
    return joint(lm_folder("gpt2"), encoder)


def tokens(model: PlanLMForCausalLM, text: str = TEXTS[0]) -> Tensor:
    ids: Tensor = model.tokenizer(text, return_tensors="pt").input_ids
    return ids


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, **inputs).logits
    return found
