"""Masks made without asking the device are those of transformers, which asks; plans in a row are counted beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from planlm.model import masks
from planlm.model.insertion import _begins, _Layout

LMS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "llama": {},
    "mistral": {"sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
}
SHAPE = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
TOKENS = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", LMS)
@torch.no_grad()
def test_they_are_transformers_own(family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = LMS[family] | TOKENS | ({} if family == "gpt2" else SHAPE)
    config = AutoConfig.for_model(family, attn_implementation=attention, **shape)
    lm = AutoModelForCausalLM.from_config(config).eval()
    packed = torch.cat((torch.arange(5), torch.arange(7)))
    for positions in (torch.stack((packed, packed.flip(0).argsort())), torch.arange(12).expand(2, -1)):
        ids = torch.randint(50, (2, 12))
        assert masks.document_masks(lm, positions) is None, "on a CPU transformers may ask"
        asked = lm(ids, position_ids=positions, use_cache=False).logits
        with monkeypatch.context() as patch:
            patch.setattr(masks, "_may_ask", lambda _: False)
            given = masks.document_masks(lm, positions)
        assert given is not None
        torch.testing.assert_close(lm(ids, attention_mask=given, position_ids=positions, use_cache=False).logits, asked)


def test_a_layout_needs_not_look_where_the_most_plans_of_a_row_are_known() -> None:
    segments = torch.tensor([[-1, 0, 0, 1, 2, 2, 2, -1], [3, 3, 3, 3, 3, 4, 4, 4]])
    looked, told = _Layout(_begins(segments), False, None), _Layout(_begins(segments), False, 3)
    assert looked.width == told.width
    assert torch.equal(looked.spread(segments), told.spread(segments))
    on_meta = _Layout(_begins(segments.to("meta")), False, 3)
    assert on_meta.width == told.width
