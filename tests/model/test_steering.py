"""Steering: plans with labels, banned and favoured actions act where the plan is made and are reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import planlm.model.generation as generation
from planlm import show
from planlm.config import GenerateConfig
from planlm.errors import InputError
from planlm.model import PlanLMConfig, PlanLMForCausalLM
from planlm.model.text import Text
from planlm.model.tracking import SentenceTracker
from tests.model.conftest import A, K, tokens

PROMPT = "The cat sat on the mat. It was warm there. Rain"
LABELS = ["weather", "boats", "birth and family", "war", "trade", "school", ""]


@pytest.fixture
def run(gpt2: PlanLMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> PlanLMForCausalLM:
    monkeypatch.setattr(generation, "load_model", lambda run: gpt2)
    gpt2.config.action_labels = LABELS
    return gpt2


def generated(**options: Any) -> dict[str, Any]:
    settings = {"run": "run", "prompt": PROMPT, "max_new_tokens": 24, **options}
    return generation.generate(GenerateConfig(**settings))


@pytest.mark.parametrize("selection", ["soft", "hard", "straight-through", "top-k"])
@torch.no_grad()
def test_a_banned_action_does_not_touch_the_text(gpt2: PlanLMForCausalLM, selection: str) -> None:
    """With all but one action banned every plan is that one's, as if it were forced."""
    gpt2.config.plan_top_k = 3
    ids = tokens(gpt2, PROMPT)
    bias = torch.full((K,), -torch.inf)
    bias[4] = 0.0
    real = torch.ones_like(ids, dtype=torch.bool)
    tracker = SentenceTracker(gpt2.tokenizer, gpt2.encoder, action_bias=bias)
    banned = gpt2(ids, plan=Text(ids, real, tracker), selection=selection)
    inputs = SentenceTracker(gpt2.tokenizer, gpt2.encoder).inputs(ids)
    forced = gpt2(ids, plan=inputs.replaced(actions=torch.full((len(inputs.segment_rows),), 4), oracle_weight=1.0))
    torch.testing.assert_close(banned.logits, forced.logits)
    assert not torch.allclose(banned.logits, gpt2(ids, selection=selection).logits)
    assert banned.action_logits is not None
    assert banned.action_logits.isneginf().sum() == (K - 1) * len(inputs.segment_rows)


@torch.no_grad()
def test_favour_adds_nats_to_the_logit(gpt2: PlanLMForCausalLM) -> None:
    ids = tokens(gpt2, PROMPT)
    inputs = SentenceTracker(gpt2.tokenizer, gpt2.encoder).inputs(ids)
    bias = torch.zeros(K)
    bias[2] = 1.5
    plain, moved = (gpt2(ids, plan=one).action_logits for one in (inputs, inputs.replaced(action_bias=bias)))
    torch.testing.assert_close(moved, plain + bias)


def test_plan_takes_labels_and_the_planners_choice(run: PlanLMForCausalLM) -> None:
    result = generated(plan="Birth and family, *,1", max_new_tokens=60)
    forced = [sentence["forced"] for sentence in result["plan"][:3]]
    assert forced == [2, None, 1][: len(forced)] and len(forced) >= 1
    assert result["plan"][0]["action"] == 2 and result["plan"][0]["label"] == "birth and family"
    text = show.generation(result, GenerateConfig(run="run", prompt=PROMPT, show_plan=True))
    assert "plan 2 (birth and family), as asked" in text
    for carried, words in ((2, "as asked, and carried;"), (5, "as asked, and carries 5;"), (None, "as asked;")):
        result["plan"][0]["carried"] = carried
        assert words in show.generation(result, GenerateConfig(run="run", prompt=PROMPT, show_plan=True))


def test_ban_and_favour_are_reported_and_hold(run: PlanLMForCausalLM) -> None:
    plain = generated()
    likely = plain["plan"][0]["action"]
    result = generated(ban=f"{likely},school", favour="trade:12")
    assert result["ban"] == sorted({likely, 5}) and result["favour"] == {"4": 12.0}
    for sentence in result["plan"]:
        shown = {action["action"]: action["probability"] for action in sentence["actions"]}
        assert sentence["action"] == 4 and shown[4] > 0.9
        assert not any(shown.get(banned) for banned in result["ban"])
    assert plain["ban"] == [] and plain["favour"] == {}


def test_an_unknown_label_names_the_closest(run: PlanLMForCausalLM) -> None:
    with pytest.raises(InputError, match=r"--ban 'boat': no action has this label; the closest is 1 \(boats\)"):
        generated(ban="boat")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"], "action_labels: 1 labels for 7 actions"),
        (["a, b"] * K, "texts without commas"),
        ("abcdefg", "null or a list"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Any, message: str) -> None:
    with pytest.raises((InputError, TypeError), match=message):
        PlanLMConfig(num_actions=K, action_dim=A, action_labels=labels)


def test_labels_stay_with_a_model(gpt2: PlanLMForCausalLM, tmp_path: Any) -> None:
    gpt2.config.action_labels = LABELS
    gpt2.save_pretrained(tmp_path)
    assert PlanLMForCausalLM.from_pretrained(tmp_path).config.action_labels == LABELS
