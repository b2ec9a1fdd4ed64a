"""Ways into the LM: inserted positions against a slow reference, in caches and batches; the control; refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, StaticCache

from planlm.errors import InputError
from planlm.model import PlanLMConfig, PlanLMForCausalLM
from planlm.model.families import OUTPUT_PROJECTIONS
from tests.model.conftest import TEXTS
from tests.model.test_modeling import BOTTLENECK, FAMILIES, WAYS, A, K, batch, joint_model, tiny_config

Folder = Callable[[str], str]


@pytest.fixture(params=FAMILIES)
def inserting(request: pytest.FixtureRequest, lm_folder: Folder, encoder: object) -> PlanLMForCausalLM:
    return joint_model(lm_folder(request.param), encoder, conditioning="insert")


@torch.no_grad()
def reference(model: PlanLMForCausalLM, ids: Tensor, segments: list[int], plans: Tensor) -> Tensor:
    """Logits `[W, V]` of one window, a vector at a time, by the LM alone."""
    embedded, vectors, numbers, tokens = model.lm.get_input_embeddings()(ids), [], [], []
    for at, segment in enumerate(segments):
        if segment >= 0 and segment not in segments[:at]:
            vectors.append(plans[segment])
            numbers.append(at)
        tokens.append(len(vectors))
        vectors.append(embedded[at])
        numbers.append(at)
    everything = torch.ones(1, len(vectors), dtype=torch.long)
    inputs = {"inputs_embeds": torch.stack(vectors)[None], "position_ids": torch.tensor([numbers])}
    logits: Tensor = model.lm(**inputs, attention_mask=everything, use_cache=False).logits[0, tokens]
    return logits


def test_insertion_is_that_of_a_slow_reference(inserting: PlanLMForCausalLM) -> None:
    """Windows apart, packed with padding behind, and behind padding: all outputs are those of the tokens."""
    inputs, plain = batch(), inserting.adapter
    (ids, segments), width = (inputs[name] for name in ("input_ids", "segment_ids")), 10
    states = inserting.planner(inputs["sentence_embeddings"])[inputs["segment_rows"].unbind(1)]
    plans = inserting.planner.head(states).softmax(-1) @ plain.codebook @ plain.weight.T + plain.bias
    expected = [reference(inserting, ids[row], segments[row].tolist(), plans) for row in range(2)]
    apart = inserting(**inputs)
    torch.testing.assert_close(apart.logits, torch.stack(expected), rtol=1e-4, atol=1e-5)
    row = {
        "input_ids": torch.cat((ids.flatten(), torch.zeros(3, dtype=torch.long)))[None],
        "segment_ids": torch.cat((segments.flatten(), torch.full((3,), -1)))[None],
        "position_ids": torch.cat((torch.arange(width), torch.arange(width + 3)))[None],
    }
    packed = inserting(**inputs | row, use_cache=False)
    torch.testing.assert_close(packed.logits[0, : 2 * width], torch.cat(expected), rtol=1e-4, atol=1e-5)
    left = {
        "input_ids": torch.nn.functional.pad(ids, (3, 0)),
        "segment_ids": torch.nn.functional.pad(segments, (3, 0), value=-1),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (3, 0)),
        "position_ids": torch.nn.functional.pad(torch.arange(width), (3, 0)).expand(2, -1),
    }
    padded = inserting(**inputs | left, use_cache=False)
    torch.testing.assert_close(padded.logits[:, 3:], torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_all_outputs_are_the_tokens(inserting: PlanLMForCausalLM) -> None:
    inserting.set_attn_implementation("eager")
    inputs = batch()
    for use_cache in (False, True):
        wanted = {"output_hidden_states": True, "output_attentions": True, "use_cache": use_cache}
        output = inserting(**inputs, **wanted, labels=inputs["input_ids"])
        assert output.logits.shape[:2] == output.token_nll.shape == (2, 10)
        assert {tuple(states.shape) for states in output.hidden_states} == {(2, 10, 32)}
        assert {tuple(weights.shape) for weights in output.attentions} == {(2, 2, 10, 10)}
        torch.testing.assert_close(inserting.lm.lm_head(output.hidden_states[-1]), output.logits)


def test_a_window_as_long_as_the_context_fits(lm_folder: Folder, encoder: object) -> None:
    model = joint_model(lm_folder("gpt2"), encoder, conditioning="insert")
    ids = model.tokenizer(" ".join(TEXTS) * 8, return_tensors="pt").input_ids[:, :256]
    assert ids.shape[1] == model.lm.config.max_position_embeddings
    assert model(ids).logits.shape[1] == 256


def test_the_planned_positions_reach_the_gradient_through_checkpointed_layers(inserting: PlanLMForCausalLM) -> None:
    inputs, gradients = batch(), []
    for checkpointed in (False, True):
        inserting.train()
        for module in inserting.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointed:
            inserting.gradient_checkpointing_enable()
        inserting(**inputs, shift_labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in inserting.named_parameters() if p.grad is not None})
        inserting.zero_grad()
    assert "planner.head.weight" in gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


class Endings:
    """A few words, and a full stop at every sixth position of one row and every fourth of the next."""

    def __init__(self, model: PlanLMForCausalLM, rows: int) -> None:
        words = model.tokenizer(" The cat sat on mat was warm there Boats", add_special_tokens=False).input_ids
        self.words = torch.tensor(sorted(set(words)))
        self.stop = torch.tensor(model.tokenizer(".", add_special_tokens=False).input_ids)
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        masked = torch.full_like(scores, -torch.inf)
        for row in range(len(scores)):
            every = (6, 4)[row * self.rows // len(scores) % 2]
            allowed = self.stop if input_ids.shape[1] % every == 0 else self.words
            masked[row, allowed] = scores[row, allowed]
        return masked


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3}])
def test_rows_that_end_sentences_at_different_steps_are_generated_as_without_a_cache(
    inserting: PlanLMForCausalLM, sampling: dict[str, Any]
) -> None:
    """Prompts of different lengths, padded on the left; each row also is what it is alone."""
    model = inserting
    texts = [model.tokenizer(text).input_ids for text in TEXTS[:2]]
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    settings = {"max_new_tokens": 20, "eos_token_id": -1, "pad_token_id": 0, **sampling}
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        endings = [Endings(model, 2)]
        runs.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, logits_processor=endings, **settings))
    assert torch.equal(*runs)
    ends = [(row == endings[0].stop).nonzero()[:, 0].tolist() for row in runs[0][:, width:]]
    assert ends[0] != ends[1] and min(map(len, ends)) > 2
    if not sampling.get("do_sample"):
        first = model.generate(ids[:1], attention_mask=mask[:1], logits_processor=[Endings(model, 1)], **settings)
        assert torch.equal(first, runs[0][:1])


def test_a_cache_is_continued_by_plain_calls(inserting: PlanLMForCausalLM) -> None:
    ids = inserting.tokenizer(TEXTS[0], return_tensors="pt").input_ids
    whole, cache, found = inserting(ids).logits, DynamicCache(), []
    with torch.no_grad():
        for some in ids.split(4, dim=1):
            found.append(inserting(some, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() > ids.shape[1]
    with pytest.raises(InputError, match="plans are among its columns"):
        inserting(ids[:, :1], past_key_values=cache, selection="none")
    cache.crop(-3)
    with pytest.raises(InputError, match="the text behind this cache is not known"):
        inserting(ids[:, -3:], past_key_values=cache)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size"),
    ],
)
def test_generation_that_counts_on_a_column_per_token_is_refused(
    inserting: PlanLMForCausalLM, settings: dict[str, Any], named: str
) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(InputError, match=f"^{named}: not supported with conditioning insert"):
        inserting.generate(ids, max_new_tokens=2, **settings)
    inserting.generate(ids, max_new_tokens=2, selection="none", pad_token_id=0, **settings)


def test_calls_that_cannot_be_laid_out_are_refused(inserting: PlanLMForCausalLM) -> None:
    inputs = batch()
    with pytest.raises(InputError, match="needs a cache that grows"):
        inserting(**inputs, past_key_values=StaticCache(inserting.lm.config, max_cache_len=32))
    with pytest.raises(InputError, match="attention_mask: conditioning insert takes one of two dimensions"):
        inserting(**inputs, attention_mask=torch.ones(2, 1, 10, 10, dtype=torch.bool).tril())
    cache = inserting(**inputs, use_cache=True).past_key_values
    with pytest.raises(InputError, match="it is not known where its plans are"):
        inserting(**inputs, past_key_values=cache)


@pytest.mark.parametrize("model_type", sorted(OUTPUT_PROJECTIONS))
@pytest.mark.parametrize("way", ["embedding", "insert", "bottleneck"])
def test_every_family_is_conditioned(model_type: str, way: str) -> None:
    config = tiny_config(model_type)
    config.sliding_window = None
    options = {"num_actions": K, "action_dim": A, "planner_heads": 2, "conditioned_layers": 2}
    model = PlanLMForCausalLM(PlanLMConfig(text_config=config, **options, **WAYS.get(way, BOTTLENECK))).eval()
    inputs = batch()
    inputs["input_ids"] %= 50
    plain = model.lm(inputs["input_ids"]).logits
    starts_there = torch.equal(model(**inputs).logits, plain)
    assert starts_there == (way != "insert"), "training starts from the base LM"
    for parameter in model.adapter.parameters():
        torch.nn.init.normal_(parameter)
    assert torch.equal(model(inputs["input_ids"], selection="none").logits, plain)
    assert not torch.allclose(model(**inputs).logits, plain)


def test_inserted_positions_start_as_the_mean_token(lm_folder: Folder) -> None:
    model = PlanLMForCausalLM.from_lm(lm_folder("llama"), torch.randn(K, A), conditioning="insert")
    torch.testing.assert_close(model.adapter.bias.data, model.lm.get_input_embeddings().weight.data.mean(dim=0))


def test_each_layers_codebook_starts_as_the_centroids_and_goes_its_own_way(lm_folder: Folder, encoder: object) -> None:
    centroids, inputs = torch.randn(K, A), batch()
    folder, ways = lm_folder("gpt2"), ({}, {"codebook_per_layer": True})
    shared, own = (PlanLMForCausalLM.from_lm(folder, centroids, conditioned_layers=2, **way).eval() for way in ways)
    assert own.codebook.shape == (2, K, A) and torch.equal(own.codebook[1], centroids)
    own.planner.load_state_dict(shared.planner.state_dict())
    with torch.no_grad():
        own.adapter.weight.copy_(torch.nn.init.normal_(shared.adapter.weight))
    torch.testing.assert_close(own(**inputs).logits, shared(**inputs).logits, rtol=1e-4, atol=1e-5)
    own(**inputs, shift_labels=inputs["input_ids"]).loss.backward()
    lower, upper = own.codebook.grad
    assert not torch.allclose(lower, upper) and lower.abs().sum() > 0 < upper.abs().sum()


@pytest.mark.parametrize("options", [{}, {"planner_layers": 1, "conditioned_layers": 1}, {"num_actions": 300}])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_control_has_as_many_weights_as_planner_and_adapter(family: str, options: dict[str, Any]) -> None:
    config = AutoConfig.for_model(family, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=50)
    settings = {"num_actions": 32, "action_dim": 24, "conditioned_layers": 2, "planner_heads": 2} | options
    with torch.device("meta"):
        adapter, control = (
            PlanLMForCausalLM(PlanLMConfig(text_config=config, **settings, **way)) for way in ({}, BOTTLENECK)
        )
    base = sum(parameter.numel() for parameter in adapter.lm.parameters())
    expected, found = (sum(p.numel() for p in model.parameters()) - base for model in (adapter, control))
    assert abs(found - expected) < 0.01 * expected


def test_the_control_has_no_plan(lm_folder: Folder) -> None:
    model = PlanLMForCausalLM.from_lm(lm_folder("gpt2"), torch.randn(K, A), encoder="none", **BOTTLENECK).eval()
    ids = torch.tensor([[5, 6, 7]])
    assert model.planner is None and torch.equal(model(ids).logits, model.lm(ids).logits)  # no encoder is asked for
    assert model.generate(ids, max_new_tokens=2, pad_token_id=0).shape[1] <= 5
    with pytest.raises(InputError, match="selection soft: the model has no plan"):
        model(ids, selection="soft")


@pytest.mark.parametrize("way", [*WAYS, "bottleneck"])
def test_models_are_saved_and_loaded(way: str, lm_folder: Folder, encoder: object, tmp_path: Path) -> None:
    model, inputs = joint_model(lm_folder("llama"), encoder, **WAYS.get(way, BOTTLENECK)), batch()
    model.save_pretrained(tmp_path)
    loaded = PlanLMForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning": "insert", "gate": True}, "gate: has no meaning with conditioning insert"),
        ({"conditioning": "embedding", "codebook_per_layer": True}, "codebook-per-layer: has no meaning"),
        ({"conditioning": "bottleneck"}, "selection soft: conditioning bottleneck has no plan; set selection fixed"),
        ({"conditioning": "prefix"}, "expected one of adapter, embedding, insert, bottleneck"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PlanLMConfig(**options)


def test_positions_are_not_inserted_into_a_sliding_window() -> None:
    config = tiny_config("mistral")
    config.sliding_window = 8
    with pytest.raises(InputError, match="the LM attends to the last 8 positions"):
        PlanLMForCausalLM(PlanLMConfig(text_config=config, planner_heads=2, action_dim=A, conditioning="insert"))
