"""`planlm generate` of files, of several plans, and as it is written."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer

import planlm.model.attempts as attempts
import planlm.model.generation as generation
from planlm import show
from planlm.config import GenerateConfig
from planlm.errors import InputError
from planlm.model import PlanLMForCausalLM
from planlm.model.text import Text
from planlm.model.tracking import Sentence, SentenceTracker, TrackedText
from planlm.text.alignment import prompt_ids
from tests.model.conftest import A, K, joint, tokens

PROMPT = "The cat sat on the mat. It was warm there. Rain"
PROMPTS = [
    PROMPT, "Boats stayed in. The town had a mill,", "Rain fell on the harbour for three days.",
    "In 1905 the town had a mill, a school and a church. Its people traded wool with Norway. Nobody knew", PROMPT,
]  # fmt: skip
LABELS = ["weather", "boats", "birth and family", "war", "trade", "school", ""]


class Prose:
    """Leaves an untrained LM the choice of a few words, with a full stop behind five of them."""

    def __init__(self, model: PlanLMForCausalLM) -> None:
        words = model.tokenizer(" The cat sat on mat was warm there Boats", add_special_tokens=False).input_ids
        self.words = torch.tensor(sorted(set(words)))
        self.stop = model.tokenizer(".", add_special_tokens=False).input_ids[0]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, -torch.inf)
        masked[:, self.words] = scores[:, self.words]
        masked[(input_ids[:, -5:] != self.stop).all(dim=1)] = -torch.inf
        masked[(input_ids[:, -5:] != self.stop).all(dim=1), self.stop] = 0.0
        return masked


@pytest.fixture(params=["gpt2", "llama"])
def run(request: Any, lm_folder: Any, encoder: object, monkeypatch: pytest.MonkeyPatch) -> PlanLMForCausalLM:
    model = joint(lm_folder(request.param), encoder)
    monkeypatch.setattr(generation, "load_model", lambda run: model)
    model.config.action_labels = LABELS
    plain = model.generate

    def prosaic(*args: Any, logits_processor: Any = (), **kwargs: Any) -> Any:
        return plain(*args, logits_processor=[Prose(model), *logits_processor], **kwargs)

    monkeypatch.setattr(model, "generate", prosaic)
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return path


def generated(**options: Any) -> dict[str, Any]:
    return generation.generate(GenerateConfig(**{"run": "run", "max_new_tokens": 24, **options}))


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"num_plans": 2}, {"attempts": 3, "plan": "1,2,*,3,0,5"}])
def test_a_text_depends_on_its_number_and_on_no_batch(
    run: PlanLMForCausalLM, file: Path, options: dict[str, Any]
) -> None:
    results = generated(prompts=str(file), **options)["results"]
    assert [result["prompt"] for result in results] == PROMPTS
    assert all(len(result["plan"]) > 3 for result in results)
    for batch_size in (1, 2, 3):
        assert generated(prompts=str(file), batch_size=batch_size, **options)["results"] == results
    assert generated(prompt=PROMPT, **options) == results[0]
    assert (results[4]["text"] == results[0]["text"]) == ("temperature" in options), "equal prompts, noise of their own"
    assert generated(prompts=str(file), seed=1, **options)["results"] != results or "temperature" in options


def test_settings_that_read_padding_are_followed_as_without_it(
    run: PlanLMForCausalLM, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.generation_config.repetition_penalty = 3.0
    run.generation_config.bad_words_ids = [[run.tokenizer(" sat").input_ids[-1]]]
    results = generated(prompts=str(file))["results"]
    assert generated(prompts=str(file), batch_size=1)["results"] == results
    assert not any(" sat" in result["text"] for result in results)


def test_a_row_may_have_a_plan_and_an_id(run: PlanLMForCausalLM, tmp_path: Path) -> None:
    rows = [
        {"prompt": PROMPT, "plan": "3,*,boats", "id": "a"}, {"prompt": "Boats stayed in. The", "plan": [5, "*", "War"]},
        {"prompt": PROMPT, "id": 7},
    ]  # fmt: skip
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = GenerateConfig(run="run", prompts=str(path), max_new_tokens=24, plan="4", show_plan=True)
    result = generation.generate(settings)
    forced = [[sentence["forced"] for sentence in one["plan"]][:3] for one in result["results"]]
    assert forced == [[3, None, 1], [5, None, 3], [4, None, None]]
    assert [one.get("id") for one in result["results"]] == ["a", None, 7]
    shown = show.generation(result, settings)
    assert "== a\nThe cat sat" in shown and "== 2\nBoats" in shown and "plan 5 (school), as asked" in shown


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "a", "--prompts .*p.csv: expected a .txt file"),
        ("none.txt", None, "--prompts .*none.txt: no such file"),
        ("p.txt", "The cat.\n\nRain", r"p.txt:2: an empty line; delete it"),
        (
            "p.txt",
            "The cat.\n" + "Rain fell. " * 90,
            r"p.txt:2: --max-new-tokens 24: with the prompt's \d+ tokens more",
        ),
        ("p.txt", b"The cat.\nCaf\xe9", r"p.txt:2: not UTF-8"),
        ("p.txt", "", r"p.txt:1: an empty line"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"', r"p.jsonl:2: not valid JSON"),
        ("p.jsonl", '["a"]', r"p.jsonl:1: expected an object with a text 'prompt', got \['a'\]"),
        ("p.jsonl", '{"text": "a"}', r"p.jsonl:1: expected an object with a text 'prompt'"),
        ("p.jsonl", '{"prompt": "a", "plans": "1"}', r"p.jsonl:1: unknown field 'plans'; a row has prompt, plan, id"),
        ("p.jsonl", '{"prompt": "a", "plan": "ship"}', r"p.jsonl:1: plan 'ship': no action has this label"),
        ("p.jsonl", '{"prompt": "a", "plan": [7]}', r"p.jsonl:1: plan 7: expected an action from 0 to 6"),
        ("p.jsonl", '{"prompt": "a", "plan": [1.5]}', r"p.jsonl:1: plan: expected a text .* got \[1.5\]"),
        ("p.jsonl", '{"prompt": "a", "plan": 3}', r"p.jsonl:1: plan: expected a text .* got 3"),
        ("p.jsonl", '{"prompt": "a", "id": [1]}', r"p.jsonl:1: id: expected a text or a whole number, got \[1\]"),
        ("p.jsonl", '{"prompt": "a \\ud800"}', r"p.jsonl:1: holds half of a character"),
    ],
)
def test_a_bad_row_is_named_before_anything_is_generated(
    run: PlanLMForCausalLM, name: str, text: str | bytes | None, message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(run, "generate", lambda *args, **kwargs: pytest.fail("generated"))
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as caught:
        generated(prompts=str(tmp_path / name), out=str(tmp_path / "out.jsonl"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected either --prompt TEXT or --prompts FILE"),
        ({"prompt": "a", "prompts": "p.txt"}, "expected either --prompt TEXT or --prompts FILE"),
        ({"prompt": "a", "out": "o.jsonl"}, "--out o.jsonl: is for --prompts"),
        ({"prompts": "p.txt", "out": "missing/o.jsonl"}, "--out missing/o.jsonl: no such folder"),
        ({"prompts": "p.txt", "audit": "missing/a.jsonl"}, "--audit missing/a.jsonl: no such folder"),
        ({"prompts": "p.txt", "stream": True}, "--stream: shows one text"),
        ({"prompt": "a", "num_plans": 2, "stream": True}, "--stream: shows one text"),
        ({"prompt": "a", "num_plans": 2, "selection": "fixed"}, "--num-plans: selection fixed asks no planner"),
        ({"prompt": "a", "num_plans": 0}, "--num-plans 0: expected at least 1"),
        ({"prompt": "a", "attempts": 2, "stream": True}, "--stream: shows one text"),
        ({"prompt": "a", "attempts": 2, "temperature": 0}, "--attempts: all are the same at --temperature 0"),
        ({"prompt": "a", "attempts": 2, "selection": "none"}, "--attempts: nothing is planned under selection none"),
    ],
)
def test_contradicting_options_are_refused(run: PlanLMForCausalLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generated(**options)


def test_samples_of_beams_are_refused_in_a_batch(run: PlanLMForCausalLM, file: Path) -> None:
    run.generation_config.num_beams = 2
    with pytest.raises(InputError, match="samples of num_beams 2 of its generation_config"):
        generated(prompts=str(file))
    greedy = generated(prompts=str(file), temperature=0)["results"]
    assert greedy == generated(prompts=str(file), temperature=0, batch_size=1)["results"]


def test_an_interrupted_file_goes_on(
    run: PlanLMForCausalLM, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    expected = generated(prompts=str(file))["results"]
    out, made, batch = tmp_path / "out.jsonl", [], generation._batch

    def interrupted(call: Any, prompts: list[Any], step: Any) -> Any:
        made.extend(prompt.number for prompt in prompts)
        if len(made) == 4:
            raise KeyboardInterrupt
        return batch(call, prompts, step)

    monkeypatch.setattr(generation, "_batch", interrupted)
    settings = {"prompts": str(file), "out": str(out)}
    with pytest.raises(KeyboardInterrupt):
        generated(**settings, batch_size=2)
    assert not out.exists()
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl.unfinished").read_text().splitlines()[1:]]
    assert sorted(line["number"] for line in kept) == sorted(made[:2])
    first, made[:] = set(made[:2]), []
    assert generated(**settings, batch_size=3) == {"out": str(out), "prompts": 5}
    assert f"generate: 2 of 5 results are in {out}.unfinished" in capsys.readouterr().err
    assert set(made) == set(range(5)) - first
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["out.jsonl", "prompts.txt"]
    (tmp_path / "out.jsonl.unfinished").write_text('{"made_with": {"seed": 3}}\n')
    made.clear()
    generated(**settings, seed=1, batch_size=5)
    assert sorted(made) == list(range(5)) and "begun anew" in capsys.readouterr().err
    assert out.read_text() != "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in expected)
    assert show.generation({"out": "o", "prompts": 5}, GenerateConfig(run="run")) == "5 results in o"


def test_several_plans_are_ranked_by_the_models_probability(
    run: PlanLMForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    plain = generation._scores

    def watched(*args: Any) -> Any:
        seen.extend([args, plain(*args)])
        return seen[1]

    monkeypatch.setattr(generation, "_scores", watched)
    result = generated(prompt=PROMPT, num_plans=5, ban="2", plan="*,3")
    candidates = result["candidates"]
    scores = [one["score"] for one in candidates]
    assert len(scores) == 5 and scores == sorted(scores, reverse=True) and len(set(scores)) == 5
    assert (result["text"], result["plan"]) == (candidates[0]["text"], candidates[0]["plan"])
    plans = [[sentence["action"] for sentence in one["plan"]] for one in candidates]
    assert len({tuple(plan) for plan in plans}) == 5, "the plans differ"
    for one in candidates:
        assert [sentence["forced"] for sentence in one["plan"]][:3] == [None, 3, None]
        assert all(sentence["action"] != 2 for sentence in one["plan"])
        assert [sentence["drawn"] for sentence in one["plan"]][:2] == [one["plan"][0]["action"], None]
    (_, _, prompts, texts), made = seen
    for prompt, text, score in zip(prompts, texts, made, strict=True):
        drawn = plans[scores.index(score)]
        ids = torch.tensor([[*prompt, *text]])
        tracker = SentenceTracker(run.tokenizer, run.encoder, drawn, bias(2))
        tracker.start(torch.tensor([prompt]))
        with torch.no_grad():
            logits = run(ids, plan=Text(ids, torch.ones_like(ids, dtype=torch.bool), tracker)).logits[0].log_softmax(-1)
        own = [logits[len(prompt) - 1 + at, token].item() for at, token in enumerate(text)]
        assert score == pytest.approx(sum(own) / len(own), abs=1e-5)
    shown = show.generation(result, GenerateConfig(run="run", show_plan=True))
    assert f"-- 1: {scores[0]:.3f} nats a token" in shown and ", drawn; the planner's: " in shown


def bias(banned: int) -> torch.Tensor:
    return torch.tensor([-torch.inf if action == banned else 0.0 for action in range(K)])


def test_a_drawn_plan_is_followed_as_one_that_is_asked_for(run: PlanLMForCausalLM) -> None:
    """The first candidate has the noise of a single text."""
    candidates = generated(prompt=PROMPT, num_plans=3)["candidates"]
    asked = [
        generated(prompt=PROMPT, plan=",".join(str(sentence["drawn"]) for sentence in one["plan"]))["text"]
        for one in candidates
    ]
    assert any(text == one["text"] for text, one in zip(asked, candidates, strict=True))


def carried(model: PlanLMForCausalLM, sentence: str) -> int:
    embedding = model.encoder.encode([sentence])[0].astype(np.float16).astype(np.float32)
    return int(np.square(embedding - model.centroids.numpy()).sum(axis=1).argmin())


def test_of_several_attempts_the_first_that_carries_its_action_is_kept(run: PlanLMForCausalLM) -> None:
    hits = {1: 0, 8: 0}
    for action in range(K):
        plan = ",".join([str(action)] * 2)
        texts = {count: generated(prompt=PROMPT, plan=plan, attempts=count)["plan"] for count in hits}
        for count, sentences in texts.items():
            hits[count] += sum(carried(run, one["sentence"]) == action for one in sentences[:2])
        assert [one["forced"] for one in texts[8]][:3] == [action, action, None]
        assert [one["carried"] for one in texts[8][:-1]] == [carried(run, one["sentence"]) for one in texts[8][:-1]]
        if carried(run, texts[1][0]["sentence"]) == action:
            assert texts[8][0]["sentence"] == texts[1][0]["sentence"]
    assert hits[8] > hits[1] + 2


def test_where_no_attempt_carries_the_action_the_nearest_is_kept() -> None:
    one = np.zeros((K, A), np.float32)
    one[:, 0] = [0.0, 9.0, 5.0, 9.0, 9.0, 9.0, 9.0]  # all of the below carry action 0 or, at 5, action 2

    def text(*places: float) -> list[TrackedText]:
        ends = [Sentence(0, "", np.eye(1, A, dtype=np.float32)[0] * place) for place in places]
        before = Sentence(-1, "", np.zeros(A, np.float32))
        return [TrackedText([], [before, end], 0) for end in ends]

    unfinished = [text(5)[0]._replace(finished=text(5)[0].finished[:1])]
    assert attempts._best(text(1, 2, 0.5), 1, 2, one) == 1
    assert attempts._best(text(1, 5, 5.1, 2), 1, 2, one) == 1
    assert attempts._best(unfinished + text(0.1), 1, 2, one) == 1
    assert attempts._best(unfinished * 2, 1, 2, one) == 0
    assert attempts._best(text(0, 5), 1, -1, one) == 0, "nothing is asked"


def test_attempts_fit_a_context_that_is_full(run: PlanLMForCausalLM, tmp_path: Path) -> None:
    room = run.lm.config.max_position_embeddings - len(prompt_ids(run.tokenizer, PROMPT))
    (tmp_path / "p.txt").write_text(f"{PROMPT}\nRain fell.\n")
    results = generated(prompts=str(tmp_path / "p.txt"), plan="1,2,3,1,2,3,1,2", attempts=3, max_new_tokens=room)[
        "results"
    ]
    assert all(len(one["plan"]) > 8 for one in results)
    both = generated(prompt=PROMPT, num_plans=2, attempts=2, max_new_tokens=room)["candidates"]
    assert all(len(one["plan"]) > 8 for one in both)


def test_a_stop_string_ends_attempts(run: PlanLMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run.generation_config.stop_strings = ["."]
    alone = generated(prompt=PROMPT, plan="1,2,3")
    assert alone["text"].count(".") == 1
    monkeypatch.setattr(attempts, "_best", lambda *args: 0)
    assert generated(prompt=PROMPT, plan="1,2,3", attempts=3) == alone
    with_others = generated(prompt=PROMPT, num_plans=3, attempts=3)["candidates"]
    assert all(one["text"].count(".") == 1 for one in with_others)


def test_drawn_plans_end_as_they_do_without_attempts(run: PlanLMForCausalLM) -> None:
    run.generation_config.eos_token_id = run.tokenizer(" warm", add_special_tokens=False).input_ids[0]
    lengths = [
        [
            len(one["text"])
            for one in generated(prompt=PROMPT, num_plans=30, attempts=count, max_new_tokens=40)["candidates"]
        ]
        for count in (1, 4)
    ]
    assert np.mean(lengths[1]) < 1.6 * np.mean(lengths[0])


@pytest.mark.parametrize("setting", [{"min_new_tokens": 3}, {"max_time": 9.0}, {"num_beams": 2}])
def test_settings_that_count_from_the_prompt_are_refused_with_attempts(
    run: PlanLMForCausalLM, setting: dict[str, Any]
) -> None:
    run.generation_config.update(**setting)
    with pytest.raises(
        InputError, match=rf"--attempts: not with {next(iter(setting))} of run's generation_config\.json"
    ):
        generated(prompt=PROMPT, plan="1", attempts=2)


@pytest.mark.parametrize(
    "options",
    [
        {"out": "{0}/o.jsonl", "audit": "{0}/../{1}/o.jsonl"}, {"audit": "{0}/p.txt"}, {"out": "{0}/p.txt"},
        {"out": "{0}/o.jsonl", "audit": "{0}/o.jsonl.unfinished"},
    ],
)  # fmt: skip
def test_files_of_a_call_are_different_ones(
    run: PlanLMForCausalLM, file: Path, tmp_path: Path, options: dict[str, str]
) -> None:
    before = file.read_text()
    file = file.rename(tmp_path / "p.txt")
    named = {option: name.format(tmp_path, tmp_path.name) for option, name in options.items()}
    with pytest.raises(InputError, match=r"the file of --\w+, too; name another"):
        generated(prompts=str(file), **named)
    assert file.read_text() == before


def test_what_nothing_is_asked_of_is_written_as_without_attempts(run: PlanLMForCausalLM) -> None:
    assert generated(prompt=PROMPT, attempts=4) == generated(prompt=PROMPT)
    run.generation_config.eos_token_id = run.tokenizer(" warm", add_special_tokens=False).input_ids[0]
    short = generated(prompt=PROMPT)
    assert len(short["text"]) < 60 and generated(prompt=PROMPT, attempts=4) == short


def test_drawn_plans_are_attempted_too(run: PlanLMForCausalLM) -> None:
    shares = {}
    for count in (1, 6):
        candidates = generated(prompt=PROMPT, num_plans=6, attempts=count, max_new_tokens=18)["candidates"]
        first = [one["plan"][0] for one in candidates]
        assert all(sentence["drawn"] is not None for one in candidates for sentence in one["plan"])
        shares[count] = sum(carried(run, one["sentence"]) == one["drawn"] for one in first)
    assert shares[6] > shares[1]


def test_a_model_without_centroids_is_refused(run: PlanLMForCausalLM) -> None:
    run._centroids = None
    with pytest.raises(InputError, match=r"no centroids\.safetensors, which says what sentence carries what action"):
        generated(prompt=PROMPT, plan="1", attempts=2)


@torch.no_grad()
def test_actions_are_drawn_from_the_planners_distribution(run: PlanLMForCausalLM) -> None:
    run.config.plan_temperature = 0.5
    result = generated(prompt=PROMPT, num_plans=600, max_new_tokens=1)
    first = [one["plan"][0] for one in result["candidates"]]
    share = sum(one["drawn"] == one["actions"][0]["action"] for one in first) / 600
    assert share == pytest.approx(first[0]["actions"][0]["probability"], abs=0.09)


def test_a_text_is_shown_as_it_is_written(run: PlanLMForCausalLM, capsys: Any) -> None:
    expected = generated(prompt=PROMPT, plan="3,*,2")
    capsys.readouterr()
    assert generated(prompt=PROMPT, plan="3,*,2", stream=True) == expected
    error = capsys.readouterr().err
    lines = [f"[{sentence['action']} ({sentence['label']})] {sentence['sentence']}" for sentence in expected["plan"]]
    lines = [line.replace("6 (None)", "6") for line in lines]
    assert error == "".join(f"{line}\n" for line in lines) and lines[0].startswith("[3 (war)] Rain")
    assert "\x1b" not in error and "\r" not in error


def test_a_text_without_a_plan_is_shown_without_heads(run: PlanLMForCausalLM, capsys: Any) -> None:
    result = generated(prompt=PROMPT, selection="none", stream=True)
    assert " ".join(capsys.readouterr().err.split()) == f"Rain{result['text']}".strip().replace("  ", " ")


def test_transformers_streamers_work(gpt2: PlanLMForCausalLM, capsys: Any) -> None:
    ids = tokens(gpt2, PROMPT)
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": -1}
    whole = gpt2.generate(ids, **settings)[0, ids.shape[1] :]
    expected = gpt2.tokenizer.decode(whole)
    printed = TextStreamer(gpt2.tokenizer, skip_prompt=True)
    gpt2.generate(ids, streamer=printed, **settings)
    assert capsys.readouterr().out == expected + "\n"
    pieces = TextIteratorStreamer(gpt2.tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=gpt2.generate, args=(ids,), kwargs={"streamer": pieces, **settings})
    thread.start()
    assert "".join(pieces) == expected
    thread.join()


def test_a_character_of_several_tokens_is_shown_whole(gpt2: PlanLMForCausalLM) -> None:
    stream = io.StringIO()
    tracker = SentenceTracker(gpt2.tokenizer, gpt2.encoder)
    streamer = generation.SentenceStreamer(tracker, lambda text: str(text.segments[-1]), stream)
    ids = gpt2.tokenizer("It was. ☃ ☃ stood. Rain").input_ids
    start = len(gpt2.tokenizer("It").input_ids)
    streamer.put(torch.tensor([ids[:start]]))
    for token in ids[start:]:
        streamer.put(torch.tensor([token]))
        assert "\ufffd" not in stream.getvalue()
    streamer.end()
    assert stream.getvalue() == "[0] It was.\n[1] ☃ ☃ stood.\n[2] Rain\n"
