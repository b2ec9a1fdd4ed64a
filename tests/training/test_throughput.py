"""Counted FLOPs and the metrics of a log line."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from planlm.training.flops import lm_flops
from planlm.training.throughput import Throughput, summary

LMS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=64, n_head=4, vocab_size=300)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=300,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("family", LMS)
def test_flops_are_those_that_torch_counts(family: str, trained: bool) -> None:
    """torch counts attention without the causal half, which is taken out here."""
    lm = LMS[family]()
    lm.requires_grad_(trained)
    hook = lm.base_model.get_submodule("h" if family == "gpt2" else "layers")[1].register_forward_pre_hook(
        lambda _, inputs: (inputs[0] if trained else inputs[0].detach().requires_grad_(), *inputs[1:])
    )
    lm.config._attn_implementation = "eager"  # its products are counted as such
    ids = torch.randint(300, (2, 32))
    with FlopCounterMode(display=False) as counter:
        lm(ids, labels=ids, use_cache=False).loss.backward()
    hook.remove()
    counted = lm_flops(lm, 64, 32, trained=trained, first_layer=1)
    attention = 4 * 2 * 2 * 32 * 64 * 64  # four layers, two products, of every token with all 32
    passes = 3 if trained else 1 + 2 * 0.75
    assert counted == pytest.approx(counter.get_total_flops() - attention * passes / 2, rel=0.02)


def test_metrics_are_those_since_the_line_before() -> None:
    throughput = Throughput(lambda batches: 1e9 * len(batches), rate=1e12, first=2, steps=10)
    throughput.step(100, ["batch"])
    with throughput.waiting():
        pass
    first = throughput.metrics()
    assert first["percent"] == 30.0 and first["tokens_per_second"] > 0 and 0 <= first["waiting"] <= 1
    assert first["memory"] > 1e6 and first["utilisation"] > 0
    assert throughput.metrics()["tokens_per_second"] == 0.0


def test_a_line_says_what_one_wants_to_know() -> None:
    metrics = {"tokens_per_second": 1234.5, "waiting": 0.2, "seconds_left": 600, "memory": 2.5e9, "utilisation": 0.791}
    assert summary(2.0, metrics) == (
        "loss 2.0000, 1,234 tokens/s, 79 % of matrix-product rate, 20 % waiting for data, 2.5 GB, 10 min left"
    )
