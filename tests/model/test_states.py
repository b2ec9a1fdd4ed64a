"""A planner that reads the LM's states: which tokens make a sentence's state, causality, gradients, generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from planlm.errors import InputError
from planlm.model import PlanLMForCausalLM
from planlm.model.families import OUTPUT_PROJECTIONS
from planlm.model.states import lower_part, sentence_states, upper_part
from planlm.model.tracking import SentenceTracker
from planlm.plan_inputs import PlanInputs

FAMILIES = ("gpt2", "llama")
KINDS = ("lm", "both")
K, A = 7, 16
TEXT = "The cat sat on the mat. It was warm there. Rain fell on the harbour. Boats stayed in. The town had a mill."


def joint(folder: str, encoder: object, kind: str, **options: Any) -> PlanLMForCausalLM:
    """A tiny joint model with a loud plan and a loud projection of the LM's states."""
    torch.manual_seed(0)
    model = PlanLMForCausalLM.from_lm(
        folder, torch.randn(K, A), planner_input=kind, encoder="none", **({"conditioned_layers": 2} | options)
    )
    nn.init.normal_(model.adapter.weight)
    assert model.planner_input is not None
    nn.init.normal_(model.planner_input.projection.weight, std=0.1)
    model.encoder = encoder  # type: ignore[assignment]
    return model.eval()


def batch() -> dict[str, Tensor]:
    """Two windows in one sequence, of documents of which the first is shown from its start, the second from within."""
    return {
        "input_ids": torch.randint(1, 300, (1, 16)),
        "position_ids": torch.tensor([[*range(8), *range(8)]]),
        "segment_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, -1]]),
        "segment_rows": torch.tensor([[0, 0], [0, 1], [0, 2], [1, 2], [1, 3], [1, 4]]),
        "sentence_embeddings": nn.functional.normalize(torch.randn(2, 6, A), dim=-1),
        "sentence_positions": torch.tensor([[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 0]]),
        "actions": torch.tensor([1, 2, 3, 4, 5, 6]),
    }


def plan_of(inputs: dict[str, Tensor]) -> PlanInputs:
    return PlanInputs(**{name: value for name, value in inputs.items() if name not in ("input_ids", "position_ids")})


@pytest.mark.parametrize("model_type", sorted(OUTPUT_PROJECTIONS))
def test_the_lm_goes_on_from_its_lower_part(model_type: str) -> None:
    """In every family: states are those that the whole LM has there, and the upper part makes of them what it does."""
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 50}
    shape |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape |= {} if model_type == "gpt2" else {"intermediate_size": 64}
    shape |= {} if model_type in ("gpt2", "gpt_neox") else {"num_key_value_heads": 2}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape)).eval()
    ids, positions = torch.randint(1, 50, (2, 12)), torch.tensor([[*range(7), *range(5)], [*range(12)]])
    whole = lm.base_model(ids, position_ids=positions, output_hidden_states=True, use_cache=False)
    for layers in range(4):
        states = lower_part(lm, layers)(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        if layers < 3:  # transformers shows the last one behind the norm
            assert torch.equal(states, whole.hidden_states[layers])
        upper = upper_part(lm, layers)(inputs_embeds=states, position_ids=positions, use_cache=False)
        assert torch.equal(upper.last_hidden_state, whole.last_hidden_state)
    assert len(lm.base_model._modules[OUTPUT_PROJECTIONS[model_type][0]]) == 3


def test_which_tokens_make_a_sentence() -> None:
    """Token t is the sentence's whose plan position t - 1 carries; a window's first counts in a document's first."""
    inputs = batch()
    found = sentence_states(torch.arange(1.0, 17)[None, :, None], plan_of(inputs), inputs["position_ids"])
    # Tokens 0-3 and 4-6 are the first two sentences; the third one, of token 7, is nowhere read. In the second window
    # token 8 may be of a sentence before; sentence 2 has 9-11, sentence 3 has 12 and 13.
    expected = torch.tensor([[0, 2.5, 6, 0, 0, 0], [0, 0, 0, 11, 13.5, 0]])
    assert torch.equal(found[..., 0], expected)


@pytest.mark.parametrize(
    ("kind", "conditioning"), [("lm", "adapter"), ("both", "adapter"), ("both", "embedding"), ("lm", "insert")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_changing_a_token_changes_no_plan_before_it(
    family: str, kind: str, conditioning: str, lm_folder: Callable[[str], str], encoder: object
) -> None:
    model, inputs = joint(lm_folder(family), encoder, kind, conditioning=conditioning), batch()
    before = model(**inputs, use_cache=False)
    for at in range(16):
        changed = inputs["input_ids"].clone()
        changed[0, at] = changed[0, at] % 299 + 1
        after = model(**(inputs | {"input_ids": changed}), use_cache=False)
        assert torch.equal(after.logits[:, :at], before.logits[:, :at])
        window = slice(0, 8) if at >= 8 else slice(8, 16)
        assert torch.equal(after.logits[:, window], before.logits[:, window]), "another window's"
        moved = (after.action_logits != before.action_logits).any(dim=1).tolist()
        # The plans of the sentences after the token's own, in its window.
        own = int(inputs["segment_ids"][0, at - 1 if at % 8 else at])
        assert moved == [own < segment and (segment < 3) == (at < 8) for segment in range(6)]


@pytest.mark.parametrize(
    "options", [{"conditioning": "embedding"}, {"conditioning": "insert"}, {"attention_window": 3}]
)
def test_with_other_conditionings_and_a_short_attention(
    options: dict[str, Any], lm_folder: Callable[[str], str], encoder: object
) -> None:
    """States are those of a pass without plans, so nothing before a token follows it; generation finds the same."""
    model, inputs = joint(lm_folder("llama"), encoder, "both", planner_lm_layers=1, **options), batch()
    before = model(**inputs, use_cache=False)
    for at in (1, 4, 6, 12):
        changed = inputs["input_ids"].clone()
        changed[0, at] = changed[0, at] % 299 + 1
        after = model(**(inputs | {"input_ids": changed}), use_cache=False)
        torch.testing.assert_close(after.logits[:, :at], before.logits[:, :at], rtol=1e-5, atol=1e-5)
        assert not torch.equal(after.action_logits, before.action_logits)
    ids = model.tokenizer(TEXT, return_tensors="pt").input_ids
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": [0]}
    assert torch.equal(model.generate(ids, use_cache=True, **how), model.generate(ids, use_cache=False, **how))


def test_the_loss_reaches_lora_below(lm_folder: Callable[[str], str], encoder: object) -> None:
    model = joint(lm_folder("llama"), encoder, "lm", lora=(2, 4.0))
    model(**batch(), want_oracle_nll=True, use_cache=False).oracle_nll[4].backward()
    lower = [p for name, p in model.lm.named_parameters() if "layers.0." in name and ".lora_B." in name]
    assert lower and any(p.grad is not None and p.grad.abs().sum() > 0 for p in lower)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_going_on_from_the_states_is_a_whole_pass(
    family: str, kind: str, lm_folder: Callable[[str], str], encoder: object
) -> None:
    """Without a cache the LM goes on above the states; asked for its hidden states it begins anew. Gradients too."""
    model, inputs = joint(lm_folder(family), encoder, kind), batch()
    found = []
    for hidden in (False, True):
        output = model(**inputs, shift_labels=inputs["input_ids"], use_cache=False, output_hidden_states=hidden)
        output.nll_sum.backward()
        assert (output.hidden_states is not None) == hidden
        found.append([output.nll_sum] + [p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_reaches_the_lower_layers_through_the_planner(
    kind: str, lm_folder: Callable[[str], str], encoder: object
) -> None:
    model, inputs = joint(lm_folder("gpt2"), encoder, kind), batch()
    loss = model(**inputs, selection="soft", use_cache=False, want_oracle_nll=True).oracle_nll[4].sum()
    loss.backward()  # the planner's alone: of the LM only what made the states has a gradient
    lower, upper = (model.lm.transformer.h[layer].mlp.c_fc.weight.grad for layer in (0, 1))
    assert lower is not None and lower.abs().sum() > 0 and upper is None
    assert model.planner_input.projection.weight.grad.abs().sum() > 0
    again = joint(lm_folder("gpt2"), encoder, kind)
    again.lm.requires_grad_(False)
    again(**inputs, want_oracle_nll=True, use_cache=False).oracle_nll[4].backward()
    assert all(p.grad is None for p in again.lm.parameters())
    torch.testing.assert_close(again.planner_input.projection.weight.grad, model.planner_input.projection.weight.grad)


def test_both_begins_as_the_pre_trained_planner(lm_folder: Callable[[str], str], encoder: object) -> None:
    inputs = batch()
    logits = []
    for kind in ("embeddings", "both"):
        torch.manual_seed(0)
        model = PlanLMForCausalLM.from_lm(lm_folder("gpt2"), torch.randn(K, A), planner_input=kind).eval()
        logits.append(model(**inputs, use_cache=False).action_logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_planned_as_its_batch(
    family: str, kind: str, lm_folder: Callable[[str], str], encoder: object
) -> None:
    model = joint(lm_folder(family), encoder, kind)
    ids = model.tokenizer(TEXT, return_tensors="pt").input_ids
    text = SentenceTracker(model.tokenizer, encoder).inputs(ids)  # type: ignore[arg-type]
    assert text.sentence_states is None, "and so the model reads them from the windows"
    expected = model(ids, plan=text, use_cache=False)
    plain = model(ids, labels=ids)
    torch.testing.assert_close(plain.logits, expected.logits, rtol=1e-4, atol=1e-5)
    plain.loss.backward()
    assert model.lm.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_and_without_cache_and_padding(
    family: str, kind: str, lm_folder: Callable[[str], str], encoder: object
) -> None:
    model = joint(lm_folder(family), encoder, kind)
    how: dict[str, Any] = {
        "max_new_tokens": 24, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
        "suppress_tokens": [0],
    }  # fmt: skip
    tokenizer = model.tokenizer
    tokenizer.padding_side = "left"
    one = tokenizer(TEXT[:43], return_tensors="pt")
    two = tokenizer([TEXT[:43], TEXT], return_tensors="pt", padding=True)
    found = [
        torch.stack(model.generate(**given, use_cache=cached, **how).logits, dim=1)[0]
        for given, cached in ((one, True), (one, False), (two, True))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)
    beams = [model.generate(**two, use_cache=cached, num_beams=3, max_new_tokens=12) for cached in (True, False)]
    assert torch.equal(*beams)


def test_a_cache_continues_the_text(lm_folder: Callable[[str], str], encoder: object) -> None:
    model = joint(lm_folder("gpt2"), encoder, "lm")
    ids = model.tokenizer(TEXT, return_tensors="pt").input_ids
    first = model(ids[:, :20])
    rest = model(ids[:, 20:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), dim=1), model(ids).logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="sentence_states"):
        model(**batch(), past_key_values=model(ids).past_key_values)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind: str, lm_folder: Callable[[str], str], encoder: object, tmp_path: Path) -> None:
    model, inputs = joint(lm_folder("llama"), encoder, kind, planner_lm_layers=3), batch()
    model.save_pretrained(tmp_path)
    loaded = PlanLMForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.state_layers == 3
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_more_layers_than_there_are_is_refused(lm_folder: Callable[[str], str], encoder: object) -> None:
    with pytest.raises(InputError, match="the LM has 3"):
        joint(lm_folder("gpt2"), encoder, "lm", planner_lm_layers=4)
