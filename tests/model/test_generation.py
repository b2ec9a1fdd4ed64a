"""Generation: sentences are found while they are written, cached and uncached runs agree, plans can be forced."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

import planlm.model.generation as generation
from planlm.config import GenerateConfig
from planlm.errors import InputError
from planlm.model import PlanLMForCausalLM
from planlm.model.loading import load_model
from planlm.model.text import Text
from planlm.model.tracking import SentenceTracker

FAMILIES = ("gpt2", "llama")
PROMPT = "The cat sat on the mat. It was warm there. Rain"


@pytest.fixture
def model(lm_folder: Callable[[str], str], encoder: object, request: pytest.FixtureRequest) -> PlanLMForCausalLM:
    """A tiny random model with a loud plan, and a full stop likely enough to end many sentences."""
    made = PlanLMForCausalLM.from_lm(lm_folder(request.param), torch.randn(7, 16), conditioned_layers=2)
    torch.nn.init.normal_(made.adapter.weight)
    made.encoder = encoder  # type: ignore[assignment]
    return made.eval()


class Prose:
    """Leaves an untrained LM the choice of a few words, with a full stop at every sixth position."""

    def __init__(self, model: PlanLMForCausalLM) -> None:
        words = model.tokenizer(" The cat sat on mat was warm there Boats", add_special_tokens=False).input_ids
        self.words = torch.tensor(sorted(set(words)))
        self.stop = torch.tensor(model.tokenizer(".", add_special_tokens=False).input_ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = self.stop if input_ids.shape[1] % 6 == 0 else self.words
        masked = torch.full_like(scores, -torch.inf)
        masked[:, allowed] = scores[:, allowed]
        return masked


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3}])
def test_cached_and_uncached_generation_agree(model: PlanLMForCausalLM, sampling: dict[str, object]) -> None:
    ids = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        tracker = SentenceTracker(model.tokenizer, model.encoder)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), tracker=tracker, max_new_tokens=40, use_cache=use_cache,
            logits_processor=[Prose(model)], eos_token_id=-1, **sampling,
        )  # fmt: skip
        runs.append(out[0].tolist())
        sentences = tracker.track(runs[-1]).sentences
    assert runs[0] == runs[1]
    assert len(sentences) > 3, "the run must have planned sentences of its own"


@pytest.mark.parametrize("model", ["gpt2"], indirect=True)
@pytest.mark.parametrize("forced", [[], [3, 1]])
@pytest.mark.parametrize("sampling", [{}, {"num_beams": 3}])
def test_a_sentence_is_planned_once(
    model: PlanLMForCausalLM, sampling: dict[str, object], forced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not at every token; what is generated is bit for bit what it would be then."""
    ids, calls, plan = model.tokenizer(PROMPT, return_tensors="pt").input_ids, [], PlanLMForCausalLM._plan

    def counted(self: PlanLMForCausalLM, *inputs: Any) -> Any:
        calls.append(inputs)
        return plan(self, *inputs)

    monkeypatch.setattr(PlanLMForCausalLM, "_plan", counted)
    runs, counts = [], []
    for keeps in (True, False):
        if not keeps:
            monkeypatch.setattr(Text, "planned_by", lambda text, model: model._plan)
        calls.clear()
        tracker = SentenceTracker(model.tokenizer, model.encoder, forced)
        out = model.generate(
            ids, tracker=tracker, max_new_tokens=40, logits_processor=[Prose(model)], eos_token_id=-1, do_sample=False,
            return_dict_in_generate=True, output_scores=True, **sampling,
        )  # fmt: skip
        runs.append((out.sequences, *out.scores))
        counts.append(len(calls))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    assert counts[1] == 40, "once a call"
    if not sampling:  # once for the prompt, whose last sentence goes on, and once for each sentence behind it
        followed = tracker.track(runs[0][0][0].tolist()).segments[ids.shape[1] : -1]
        assert len(set(followed)) > 3 and counts[0] == 1 + len(set(followed))
    assert counts[0] < 25


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_left_padding_changes_nothing(model: PlanLMForCausalLM) -> None:
    short, long = (model.tokenizer(text).input_ids for text in (PROMPT, PROMPT + " fell on the harbour. Boats"))
    pad = len(long) - len(short)
    ids = torch.tensor([[0] * pad + short, long])
    mask = torch.tensor([[0] * pad + [1] * len(short), [1] * len(long)])
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    both = model.generate(ids, attention_mask=mask, **settings)
    for row, alone in ((0, short), (1, long)):
        single = torch.tensor([alone])
        expected = model.generate(single, attention_mask=torch.ones_like(single), **settings)
        assert both[row, -12:].tolist() == expected[0, -12:].tolist()


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_prompt_is_cut_as_preparation_cuts_it_and_growth_keeps_decisions(model: PlanLMForCausalLM) -> None:
    tracker = SentenceTracker(model.tokenizer, model.encoder)
    text = "Dr. Smith came in! Was he late? Nobody knew"
    ids = model.tokenizer(text).input_ids
    state = tracker.track(ids)
    assert state.sentences == ["Dr. Smith came in!", "Was he late?"]
    assert state.segments[-1] == 2
    boundary = len(model.tokenizer("Dr. Smith came in!").input_ids)
    assert state.segments[boundary - 2 : boundary] == [0, 1], "the last token of a sentence carries the next plan"
    more = model.tokenizer(text + ". And").input_ids
    assert more[: len(ids)] == ids
    for end in range(len(ids) + 1, len(more) + 1):
        grown = tracker.track(more[:end])
        assert grown.segments[: len(ids)] == state.segments
    assert grown.sentences == [*state.sentences, "Nobody knew."]


@pytest.mark.parametrize("model", ["gpt2"], indirect=True)
def test_forced_action_is_followed(model: PlanLMForCausalLM) -> None:
    """With action a forced on the open sentence the next-token logits are those of the oracle a."""
    ids = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    tracker = SentenceTracker(model.tokenizer, model.encoder, [4])
    text = Text(ids, torch.ones_like(ids, dtype=torch.bool), tracker)
    forced = model(ids, plan=text).logits[0, -1]
    plain = SentenceTracker(model.tokenizer, model.encoder).inputs(ids)
    is_open = plain.segment_rows[:, 1] == 2
    oracle = dataclasses.replace(plain, actions=4 * is_open.long(), oracle_weight=is_open.float())
    last = model(ids, plan=oracle).logits[0, -1]
    assert torch.equal(forced, last)
    assert not torch.equal(forced, model(ids).logits[0, -1])


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_command_reports_each_sentence_with_its_plan(model: PlanLMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "load_model", lambda run: model)
    config = GenerateConfig(run="run", prompt=PROMPT, max_new_tokens=30, plan="3,1", seed=5)
    result = generation.generate(config)
    assert result == generation.generate(config), "the same seed gives the same text"
    assert result["plan"][0]["forced"] == 3 and result["plan"][0]["sentence"].startswith("Rain")
    assert all(len(sentence["actions"]) == 3 for sentence in result["plan"])
    assert sum(a["probability"] for a in result["plan"][0]["actions"]) <= 1.001
    json.dumps(result)


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.0}, {"use_cache": False}, {"num_beams": 3}])
@pytest.mark.parametrize("selection", ["soft", "hard", "uniform"])
def test_the_plan_that_is_reported_is_the_plan_that_was_used(
    model: PlanLMForCausalLM,
    temperature: float,
    settings: dict[str, object],
    selection: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The planner runs for the steps of the text alone, never for the report."""
    monkeypatch.setattr(generation, "load_model", lambda run: model)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    calls: list[int] = []
    model.planner.register_forward_hook(lambda *_: calls.append(1))
    plain, made, calls_then = model.generate, [], []

    def watched(*args: object, **kwargs: object) -> torch.Tensor:
        processors = [Prose(model), *kwargs.pop("logits_processor", [])]
        made.append(plain(*args, logits_processor=processors, eos_token_id=-1, **kwargs))
        calls_then.append(len(calls))
        return made[0]

    monkeypatch.setattr(model, "generate", watched)
    config = GenerateConfig(
        run="run", prompt=PROMPT, max_new_tokens=30, plan="3", temperature=temperature, selection=selection
    )
    plan = generation.generate(config)["plan"]
    assert len(plan) > 3 and [sentence["forced"] for sentence in plan[:2]] == [3, None]
    assert len(calls) == calls_then[0], "the planner ran once more"
    if selection == "uniform":
        assert not calls and not any(sentence["actions"] for sentence in plan)
        return
    tracker = SentenceTracker(model.tokenizer, model.encoder)
    tracker.start(torch.tensor([model.tokenizer(PROMPT).input_ids]))
    inputs = tracker.inputs(made[0][:1])
    logits = model.planner.head(model.planner_states(inputs))[2 : 2 + len(plan)]
    for sentence, expected in zip(plan, logits.softmax(dim=-1), strict=True):
        for action in sentence["actions"]:
            assert action["probability"] == pytest.approx(expected[action["action"]].item(), abs=2e-4)
    assert len({str(sentence["actions"]) for sentence in plan}) == len(plan), "sentences share a plan"


@pytest.mark.parametrize("model", ["gpt2"], indirect=True)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": "1,x"}, "--plan 'x': expected an action from 0 to 6; this model's have no labels"),
        ({"plan": "7"}, "--plan 7: expected an action from 0 to 6"),
        ({"plan": "3", "ban": "2,3"}, "--plan: action 3 is banned by --ban"),
        ({"plan": "3", "selection": "none"}, "--plan: nothing is planned under selection none"),
        ({"ban": "0,1,2,3,4,5,6"}, "--ban names every action"),
        ({"ban": "3", "selection": "fixed"}, "--ban: selection fixed asks no planner"),
        ({"favour": "3:1", "selection": "uniform"}, "--favour: selection uniform asks no planner"),
        ({"favour": "3"}, "--favour '3': expected an action, a colon and nats"),
        ({"favour": "3:inf"}, "--favour '3:inf': expected an action"),
        ({"favour": "3:1", "ban": "3"}, "--ban and --favour both name the action 3"),
        ({"prompt": ""}, "--prompt is empty"),
        ({"selection": "oracle"}, "--selection oracle needs the text"),
        ({"selection": "shuffled"}, "--selection shuffled needs the plans of another document; choose soft"),
        ({"selection": "top-k"}, "was not trained with --top-k"),
        ({"max_new_tokens": 250}, "more than the context of 256"),
        ({"temperature": 1e-40}, "--temperature 1e-40: expected 0, which is greedy, or at least 0.01"),
        ({"seed": 2**64}, "expected 0 to 2147483647"),
    ],
)
def test_bad_options_are_refused(
    model: PlanLMForCausalLM, options: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "load_model", lambda run: model)
    with pytest.raises(InputError, match=message):
        generation.generate(GenerateConfig(**{"run": "run", "prompt": PROMPT, **options}))


@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("name", "value"), [("repetition_penalty", -1), ("no_repeat_ngram_size", "x"), ("bad_words_ids", [[99999]])]
)
def test_settings_of_the_model_that_nothing_can_be_generated_with_are_named(
    model: PlanLMForCausalLM, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "load_model", lambda run: model)
    setattr(model.generation_config, name, value)
    with pytest.raises(
        InputError, match=f"run: cannot generate .* the settings {name} of its generation_config.json"
    ) as caught:
        generation.generate(GenerateConfig(run="run", prompt=PROMPT, max_new_tokens=4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_settings_that_change_what_generate_returns_change_nothing_here(
    model: PlanLMForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "load_model", lambda run: model)
    config = GenerateConfig(run="run", prompt=PROMPT, max_new_tokens=4)
    expected = generation.generate(config)
    model.generation_config.return_dict_in_generate = True
    assert generation.generate(config) == expected


def test_folder_without_a_joint_model_is_refused(lm_folder: Callable[[str], str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no trained model here"):
        load_model(str(tmp_path))
    with pytest.raises(InputError, match="a gpt2 model, not a joint model"):
        load_model(lm_folder("gpt2"))


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_stop_strings_of_the_models_own_settings_are_followed(
    model: PlanLMForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "load_model", lambda run: model)
    config = GenerateConfig(run="run", prompt=PROMPT, max_new_tokens=40, seed=5)
    whole = generation.generate(config)["text"]
    letter = next(character for character in whole[5:] if character.isascii() and character.isalpha())
    model.generation_config.stop_strings = [letter]
    stopped = generation.generate(config)["text"]
    assert letter in stopped and len(stopped) < len(whole)


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_a_prompt_is_continued_before_the_end_token_of_its_tokenizer(
    model: PlanLMForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preparation drops the token that some tokenizers put behind a text; so does what is to be continued."""
    monkeypatch.setattr(generation, "load_model", lambda run: model)
    config = GenerateConfig(run="run", prompt=PROMPT, max_new_tokens=20, seed=5)
    expected = generation.generate(config)
    template = "<s> $A <s>" if model.tokenizer("a").input_ids[0] == 0 else "$A <s>"
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0)]
    )
    assert model.tokenizer(PROMPT).input_ids[-1] == 0
    assert generation.generate(config) == expected
