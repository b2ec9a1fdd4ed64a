"""Documents that share a sequence: torch's kernel for them does what a mask does, or one line says why it cannot.

Its CUDA kernels are emulated (`flash.py`); everything else, torch's formula of the gradient too, is what a GPU runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

import planlm.kernels.lm as attention
from planlm import speedups
from planlm.corpus.batches import PlanBatch, PlanLoader, SentenceLoader
from planlm.corpus.store import document_features
from planlm.model import PlanLMForCausalLM
from planlm.model.attention import take_plans, within_documents
from planlm.model.families import set_dropout
from planlm.model.planner import Planner
from tests.model.conftest import FAMILIES, A, K, joint
from tests.model.flash import flash_on_cpu

WINDOW = 20
CPU, META = torch.device("cpu"), torch.device("meta")


def corpus(num_documents: int = 40) -> datasets.Dataset:
    """Documents of a few sentences of a few tokens, one token long at least and some longer than a window."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(num_documents):
        counts = generator.integers(1, 5, generator.integers(1, 9)).tolist()
        rows.append(
            {
                "id": str(number),
                "text": "",
                "input_ids": generator.integers(1, 300, sum(counts)).tolist(),
                "sentence_spans": [[0, 1]] * len(counts),
                "sentence_tokens": counts,
                "embeddings": generator.standard_normal((len(counts), A)).tolist(),
                "actions": generator.integers(0, K, len(counts)).tolist(),
            }
        )
    return datasets.Dataset.from_list(rows, features=document_features(A))


@pytest.fixture(scope="module")
def packed() -> PlanBatch:
    return next(iter(PlanLoader(corpus(), window=WINDOW, batch_size=3, seed=2, pack=True)))


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The path that CUDA takes, on a CPU and in float32; what the kernels were called with."""
    reason = attention.varlen_reason
    monkeypatch.setattr(
        attention, "varlen_reason", lambda _, __, *rest, **more: reason("meta", torch.bfloat16, *rest, **more)
    )
    with flash_on_cpu() as calls:
        yield calls


def without(batch: PlanBatch) -> PlanBatch:
    """The batch of somebody who does not say where documents begin: attention takes masks."""
    plan = dataclasses.replace(batch.plan, sentence_cu_seqlens=None)
    return dataclasses.replace(batch, cu_seqlens=None, plan=plan)


def run(model: PlanLMForCausalLM, batch: PlanBatch, **more: Any) -> dict[str, Tensor]:
    """NLL of tokens and actions and all gradients of a training step."""
    output = model(
        batch.input_ids, **batch.layout, shift_labels=batch.labels, plan=batch.plan, use_cache=False,
        want_oracle_nll=True, **more,
    )  # fmt: skip
    model.zero_grad()
    (output.nll_sum + output.oracle_nll.sum()).backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return {"tokens": output.token_nll.detach(), "actions": output.oracle_nll.detach(), **found}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        error = (tensor - want[name]).norm() / want[name].norm().clamp(min=1e-3)
        assert error <= 1e-5, f"{name}: {error:.1e}"


def test_the_emulation_is_attention() -> None:
    """Values and gradients, in float64, against a loop over positions."""
    begins = [0, 0, 1, 6, 6, 13, 13]
    query, key, value = (torch.randn(13, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    for back in (-1, 0, 3):
        rows = []
        for at in range(13):
            first = max(begin for begin in begins if begin <= at)
            seen = slice(first if back < 0 else max(first, at - back), at + 1)
            keys, values = (tensor[seen].repeat_interleave(2, dim=1) for tensor in (key, value))
            weights = (torch.einsum("hd,khd->hk", query[at], keys) * 0.3).softmax(-1)
            rows.append(torch.einsum("hk,khd->hd", weights, values))
        upstream, offsets = torch.randn_like(query), torch.tensor(begins, dtype=torch.int32)
        want = torch.stack(rows)
        wanted = torch.autograd.grad(want, (query, key, value), upstream)
        with flash_on_cpu() as calls:
            given = (offsets, offsets, 8, 8)
            torchs = varlen_attn(query, key, value, *given, scale=0.3, window_size=(back, 0), enable_gqa=True)
            documents = attention.Documents(offsets, 8)
            batch = (tensor[None] for tensor in (query, key, value))
            ours = attention.varlen_attention(*batch, documents, 0.3, None if back < 0 else back + 1)[0]
            for got in (torchs, ours):
                torch.testing.assert_close(got, want)
                torch.testing.assert_close(torch.autograd.grad(got, (query, key, value), upstream), wanted)
        assert calls[0] == calls[1] and calls[2] == calls[3], "the kernels are told the same"


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"again": True},
    "LoRA": {"lora": (2, 4.0)},
    "LoRA, checkpointing": {"lora": (2, 4.0), "again": True},
    "window": {"attention_window": 5},
    "window of one": {"attention_window": 1},
    "embedding": {"conditioning": "embedding"},
    "insert": {"conditioning": "insert"},
    "insert, window": {"conditioning": "insert", "attention_window": 5},
    "insert, checkpointing": {"conditioning": "insert", "again": True},
    "insert, planner reads the LM": {"conditioning": "insert", "planner_input": "both"},
    "planner context": {"context": 3},
    "planner reads the LM": {"planner_input": "both"},
    "plan off": {"selection": "none"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_by_documents_is_that_under_masks(
    family: str, way: str, flash: list[dict[str, Any]], lm_folder: Callable[[str], str], encoder: object
) -> None:
    """Values and gradients of the joint model; Llama's query heads share keys."""
    options = dict(WAYS[way])
    again, context = options.pop("again", False), options.pop("context", None)
    if context is not None:
        torch.manual_seed(0)
        options["planner"] = Planner.of_codebook(torch.randn(K, A), heads=2, context=context, dropout=0.0)
    model = joint(lm_folder(family), encoder, **options).train()
    set_dropout(model.lm, 0.0)
    if again:
        model.lm.activation_checkpointing_enable({"use_reentrant": False})
    reads = "planner_input" in options
    loader = PlanLoader(corpus(), window=WINDOW, batch_size=3, seed=2, pack=True, planner_sequence_per_window=reads)
    batch = next(iter(loader))
    want = run(model, without(batch))
    assert not flash
    assert_close(run(model, batch), want)
    layers = 3 + 2 + (1 if reads and way.startswith("insert") else 0)  # the LM's, the planner's and what it reads anew
    by_kernel = [call["kernel"] for call in flash]
    assert by_kernel.count("backward") == layers and by_kernel.count("forward") == layers + (3 if again else 0)


def test_another_document_leaves_no_trace(
    flash: list[dict[str, Any]], lm_folder: Callable[[str], str], encoder: object, packed: PlanBatch
) -> None:
    """Other tokens and sentences in one window: to the last bit, nobody else's tokens or actions cost anything else."""
    model = joint(lm_folder("llama"), encoder)
    before = run(model, packed)
    for begin, end in itertools.pairwise(packed.cu_seqlens.tolist()[1:4]):
        ids = packed.input_ids.clone()
        ids.view(-1)[begin:end] += 1
        after = run(model, dataclasses.replace(packed, input_ids=ids))
        moved = (after["tokens"] != before["tokens"]).view(-1).nonzero()[:, 0].tolist()
        assert moved and begin <= moved[0] and moved[-1] < end
        torch.testing.assert_close(after["actions"], before["actions"], rtol=0, atol=0)
    rows = packed.plan.sentence_positions.view(-1)
    embeddings = packed.plan.sentence_embeddings.clone()
    document = slice(0, int((rows[1:] == 0).nonzero()[0]) + 1)
    embeddings.view(-1, A)[document] = torch.randn(A)
    after = run(
        model, dataclasses.replace(packed, plan=dataclasses.replace(packed.plan, sentence_embeddings=embeddings))
    )
    places = packed.plan.segment_rows @ torch.tensor([packed.plan.sentence_positions.shape[1], 1])
    inside = (places < document.stop) & (packed.actions >= 0)
    assert (after["actions"] != before["actions"])[~inside].sum() == 0 < (after["actions"] != before["actions"]).sum()
    assert flash


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_cpu_offsets_change_no_bit(
    family: str, pack: bool, lm_folder: Callable[[str], str], encoder: object
) -> None:
    model = joint(lm_folder(family), encoder)
    batch = next(iter(PlanLoader(corpus(), window=WINDOW, batch_size=3, seed=2, pack=pack)))
    want, got = run(model, without(batch)), run(model, batch)
    assert all(torch.equal(got[name], want[name]) for name in want)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = run(model, without(batch)), run(model, batch)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("window", [None, 3, 9])
def test_an_lm_s_own_sliding_window(window: int | None, flash: list[dict[str, Any]], packed: PlanBatch) -> None:
    """Mistral's of 6; the smaller of two windows wins."""
    lm = tiny_lm("mistral")
    take_plans(lm, window)
    call = {"input_ids": packed.input_ids, **packed.layout, "attention_mask": None, "past_key_values": None}
    with torch.no_grad():
        want, got = (
            lm.model(**within_documents(lm, call | {"use_cache": False, "cu_seqlens": offsets})).last_hidden_state
            for offsets in (None, packed.cu_seqlens)
        )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert [call["back"] for call in flash] == [min(6, window or 6) - 1] * 2


def tiny_lm(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A tiny random LM of 4 query heads and 2 key heads."""
    shape: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, **options,
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(sliding_window=6, **shape)).eval()
    lm: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**shape)).to(dtype).eval()
    take_plans(lm)
    return lm


def test_shapes_run_through_without_data(packed: PlanBatch) -> None:
    """Tensors without data stand for a GPU's: what waits for their values raises. Under checkpointing too."""
    lm, planner = tiny_lm("llama", torch.bfloat16).to(META), Planner(A, K, heads=2, context=3).to(META, torch.bfloat16)
    lm.activation_checkpointing_enable({"use_reentrant": False})
    batch = packed.to(META)
    call = {"input_ids": batch.input_ids, **batch.layout, "attention_mask": None, "past_key_values": None}
    call = within_documents(lm.train(), call | {"use_cache": False})
    assert call["documents"] is not None and call["attention_mask"].numel() == 0
    lm.model(**call).last_hidden_state.sum().backward()
    assert all(weight.grad is not None for weight in lm.model.parameters())
    sentences = next(iter(SentenceLoader(corpus(), batch_size=8, shuffle=False))).to(META)
    planner(**sentences.planner_inputs).sum().backward()
    # The form with a mask waits for nothing either.
    for pack in (False, True):
        batch = next(iter(PlanLoader(corpus(), window=WINDOW, batch_size=3, pack=pack))).to(META)
        call = {"input_ids": batch.input_ids, **batch.layout, "attention_mask": None, "past_key_values": None}
        call = within_documents(lm.float(), call | {"use_cache": False})
        assert call["documents"] is None and (call["attention_mask"].numel() > 0) is pack
        lm.model(**call).last_hidden_state.sum().backward()


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "float32": ({"dtype": torch.float32}, "it computes in bf16 or float16, and this is float32"),
    "head size": ({"head_dim": 12}, "up to 192 or 232 to 256, and these have 12"),
    "large heads": ({"head_dim": 264}, "and these have 264"),
    "dropout": ({"dropout": 0.1}, "it has no dropout, and attention's is 0.1"),
    "old GPU": ({"capability": (7, 5)}, "it needs a GPU of compute capability 8.0, and this one has 7.5"),
    "device": ({"device_type": "cpu"}, "it runs on CUDA, and this is cpu"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_not(reason: str) -> None:
    usual: dict[str, Any] = {"device_type": "meta", "dtype": torch.bfloat16, "head_dim": 64}
    assert attention.varlen_reason(**usual) is None
    assert attention.varlen_reason(**usual | {"head_dim": 256, "capability": (9, 0)}) is None
    changes, words = REASONS[reason]
    assert words in str(attention.varlen_reason(**usual | changes))


def test_a_torch_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_has_varlen", lambda _: False)
    assert attention.varlen_reason("cuda", torch.bfloat16, 64) == f"torch {torch.__version__} has none"


FALLBACKS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "float32": ({"dtype": torch.float32}, {}, "and this is float32"),
    "head size": ({"head_dim": 12}, {}, "and these have 12"),
    "dropout": ({"attention_dropout": 0.1}, {}, "attention's is 0.1"),
    "implementation": ({"attn_implementation": "eager"}, {}, "attn_implementation is 'eager'"),
    "weights": ({}, {"output_attentions": True}, "output_attentions is set"),
    "a mask": ({}, {"attention_mask": torch.ones(3, 1, WINDOW, WINDOW, device="meta")}, "attention_mask is given"),
}


@pytest.mark.parametrize("way", FALLBACKS)
def test_each_reason_is_said_once(way: str, packed: PlanBatch, caplog: pytest.LogCaptureFixture) -> None:
    options, more, words = FALLBACKS[way]
    attention.say_masked.cache_clear()
    options = {"dtype": torch.bfloat16, **options}
    lm, batch = tiny_lm("llama", **options).train().to(META), packed.to(META)
    call = {"input_ids": batch.input_ids, **batch.layout, "attention_mask": None, "past_key_values": None}
    with caplog.at_level(logging.WARNING, "planlm.kernels"):
        for _ in range(2):
            made = within_documents(lm, call | {"use_cache": False} | more)
            assert made.get("documents") is None and not {"cu_seqlens", "longest"} & made.keys()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("packed documents: attention takes a mask") and words in line
    attention.say_masked.cache_clear()


def test_a_cpu_says_nothing(packed: PlanBatch, caplog: pytest.LogCaptureFixture) -> None:
    attention.say_masked.cache_clear()
    lm, call = tiny_lm("llama"), {"input_ids": packed.input_ids, "attention_mask": None, "past_key_values": None}
    within_documents(lm, call | packed.layout | {"use_cache": False, "output_attentions": True})
    Planner(A, K, heads=2)(**next(iter(SentenceLoader(corpus(), batch_size=8))).planner_inputs)
    assert not caplog.records


def test_torch_compiles_it_in_one_piece(flash: list[dict[str, Any]], packed: PlanBatch) -> None:
    lm = tiny_lm("llama", num_hidden_layers=1)
    call = {"input_ids": packed.input_ids, **packed.layout, "attention_mask": None, "past_key_values": None}
    call = within_documents(lm, call | {"use_cache": False})
    want = lm.model(**call).last_hidden_state
    compiled = torch.compile(lm.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**call).last_hidden_state, want)
    assert flash[0] == flash[1]


def test_the_switch_of_speed_ups_turns_it_off(packed: PlanBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, batch = tiny_lm("llama", torch.bfloat16).to(META), packed.to(META)
    call = {"input_ids": batch.input_ids, **batch.layout, "attention_mask": None, "past_key_values": None}
    assert within_documents(lm, call | {"use_cache": False})["documents"] is not None
    monkeypatch.setattr(speedups, "ON", set())
    made = within_documents(lm, call | {"use_cache": False})
    assert "documents" not in made and made["attention_mask"].dtype == torch.bool, "transformers' own mask"


def test_inserted_plans_of_texts_that_share_a_row(
    flash: list[dict[str, Any]], lm_folder: Callable[[str], str], encoder: object
) -> None:
    """Planned by the model, whether or not the call says that it wants no cache."""
    model = joint(lm_folder("llama"), encoder, conditioning="insert")
    one = model.tokenizer("A first sentence. And one more.").input_ids
    ids = torch.tensor([one + one])
    layout = {
        "position_ids": torch.tensor([[*range(len(one))] * 2]),
        "cu_seqlens": torch.tensor([0, len(one), 2 * len(one)], dtype=torch.int32),
        "longest": len(one),
    }
    with torch.no_grad():
        found = [model(ids, **layout, **asked).logits for asked in ({"use_cache": False}, {}, {"use_cache": None})]
    assert flash and all(torch.equal(logits, found[0]) for logits in found)
