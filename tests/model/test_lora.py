"""LoRA: where it stands, what it leaves alone, and that merged weights compute the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from planlm.model import PlanLMForCausalLM
from planlm.model.lora import lora_parameters, merged


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_merged_weights_compute_the_same(family: str, lm_folder: Callable[[str], str]) -> None:
    codebook = torch.randn(5, 16)
    plain = PlanLMForCausalLM.from_lm(lm_folder(family), codebook, conditioned_layers=2).eval()
    model = PlanLMForCausalLM.from_lm(lm_folder(family), codebook, conditioned_layers=2, lora=(3, 7.0)).eval()
    inputs = {
        "input_ids": torch.randint(300, (2, 12)),
        "segment_ids": torch.arange(2)[:, None].expand(2, 12),
        "segment_rows": torch.tensor([[0, 0], [1, 1]]),
        "sentence_embeddings": torch.randn(2, 2, 16),
    }
    torch.nn.init.normal_(model.adapter.weight)
    for part in ("adapter", "planner"):  # drawn at random
        plain.get_submodule(part).load_state_dict(model.get_submodule(part).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)  # the second matrix is zero
        added = lora_parameters(model.lm, prefix="lm")
        layers = model.lm.config.num_hidden_layers
        assert len(added) == 2 * layers * (4 if family == "gpt2" else 7)
        for parameter in added.values():
            torch.nn.init.normal_(parameter, std=0.3)
        wanted = model(**inputs).logits
        assert (wanted - plain(**inputs).logits).abs().max() > 0.1
        before = {name: value.clone() for name, value in model.state_dict().items()}
        weights = merged(model, model.state_dict())
        assert weights.keys() == plain.state_dict().keys()
        plain.load_state_dict(weights)
        torch.testing.assert_close(plain(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
