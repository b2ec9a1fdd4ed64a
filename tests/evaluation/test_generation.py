"""`planlm evaluate-generation`: texts that depend on seed and document alone, kept as they are finished; its result."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import planlm.evaluation.generation as generation
from planlm.config import EvaluateGenerationConfig
from planlm.errors import InputError
from planlm.evaluation.generation_statistics import METRICS, Following, compare_following
from planlm.evaluation.generation_steering import follow
from planlm.evaluation.generation_texts import continue_prompts, find_prompts
from planlm.files import locked
from planlm.model.loading import load_model
from planlm.model.sampling import gumbel
from planlm.model.tracking import SentenceTracker
from planlm.pretrained.tokenizer import load_tokenizer
from planlm.report.generation import GENERATION_METRICS, format_generation

SIZES = {"prompts": 8, "prompt_sentences": 1, "max_new_tokens": 20, "batch_size": 4, "bootstrap": 50}


@pytest.fixture
def config(make_corpus, make_run, encoder, monkeypatch):
    """Settings of a call on a tiny run, by the family of its LM."""
    monkeypatch.setattr(generation, "SentenceEncoder", lambda name, precision: encoder)

    def make(family="gpt2", conditioning="adapter", **options):
        corpus = make_corpus(family, test=[" ".join(["The cat sat on the mat. It was warm there. Rain fell."] * 4)] * 9)
        return EvaluateGenerationConfig(
            run=str(make_run(corpus, family, conditioning=conditioning)), corpus=str(corpus.path), **SIZES | options
        )

    return make


def tokens_by_document(run, plan):
    lines = [json.loads(line) for line in (run / "generation_evaluation" / f"{plan}.jsonl").read_text().splitlines()]
    return {line["document"]: line["tokens"] for line in lines[1:]}


@pytest.mark.parametrize(("family", "conditioning"), [("gpt2", "adapter"), ("llama", "insert")])
def test_texts_do_not_depend_on_the_batch_and_figures_come_out_twice(family, conditioning, config, tmp_path):
    settings = config(family, conditioning)
    result = generation.evaluate_generation(settings)
    texts = {plan: tokens_by_document(tmp_path / "run", plan) for plan in ("none", "soft")}
    assert {len(tokens) for tokens in texts["soft"].values()} == {20} and len(texts["soft"]) == 8
    assert texts["none"] != texts["soft"]
    assert len({tuple(tokens) for tokens in texts["none"].values()}) == 8, "equal prompts have noise of their own"
    for plan in texts:
        (tmp_path / "run" / "generation_evaluation" / f"{plan}.jsonl").unlink()
    again = generation.evaluate_generation(EvaluateGenerationConfig(**vars(settings) | {"batch_size": 3}))
    assert again == result
    assert {plan: tokens_by_document(tmp_path / "run", plan) for plan in texts} == texts
    stored = json.loads((tmp_path / "run" / "generation_evaluation.json").read_text())["test"]
    assert {key: stored[key] for key in result} == json.loads(json.dumps(result))
    assert stored["documents"] == list(range(8)) and len(stored["scores"]["soft"]["rouge2"]) == 8
    assert [row["plan"] for row in result["rows"]] == ["none", "soft"]
    assert set(result["rows"][0]["metrics"]) == set(METRICS) == {key for key, _, _ in GENERATION_METRICS}
    shown = format_generation(result)
    assert all(label in shown for _, label, _ in GENERATION_METRICS)
    assert max(map(len, shown.splitlines())) <= 80


@torch.no_grad()
def test_a_text_is_the_arg_max_of_noisy_logits_of_its_nucleus(config, make_corpus, tmp_path):
    """Token by token, without a cache, a batch or a library's sampling."""
    settings = config(plans="none", temperature=0.7, top_p=0.6, seed=5)
    generation.evaluate_generation(settings)
    model = load_model(settings.run)
    for document, tokens in list(tokens_by_document(tmp_path / "run", "none").items())[:2]:
        ids = make_corpus(name="again", test=["The cat sat on the mat. It was warm there."]).split("test")[0]
        ids = ids["input_ids"][: ids["sentence_tokens"][0]]
        for position in range(20):
            logits = model(torch.tensor([ids]), selection="none").logits[0, -1].float()
            logits[model.tokenizer.all_special_ids] = -torch.inf
            probabilities = (logits / 0.7).softmax(dim=-1)
            more = torch.stack([probabilities[probabilities > one].sum() for one in probabilities])
            noisy = (logits / 0.7).masked_fill(more >= 0.6, -torch.inf) + gumbel((5, document, position), len(logits))
            ids = [*ids, int(noisy.argmax())]
        assert ids[-20:] == tokens


def test_an_interrupted_call_goes_on(config, tmp_path, monkeypatch):
    settings = config()
    expected = generation.evaluate_generation(settings)
    folder = tmp_path / "run" / "generation_evaluation"
    whole = tokens_by_document(tmp_path / "run", "soft")
    lines = (folder / "soft.jsonl").read_text().splitlines(keepends=True)
    (folder / "soft.jsonl").write_text("".join(lines[:6]) + lines[6][:30])  # killed while it wrote the sixth text
    made = []

    def watched(model, prompts, *more):
        made.append(len(prompts))
        return continue_prompts(model, prompts, *more)

    monkeypatch.setattr(generation, "continue_prompts", watched)
    assert generation.evaluate_generation(settings) == expected
    assert made == [0, 3]
    assert tokens_by_document(tmp_path / "run", "soft") == whole
    for other in ({"seed": 1}, {"temperature": 0}):
        made.clear()
        generation.evaluate_generation(EvaluateGenerationConfig(**vars(settings) | other))
        assert made == [8, 8], "texts of other settings are none of this call"


def test_a_folder_that_cannot_be_written_costs_a_warning_and_one_in_use_is_refused(config, tmp_path, capsys):
    settings = config(plans="none")
    folder = tmp_path / "run" / "generation_evaluation"
    folder.write_text("")
    result = generation.evaluate_generation(settings)
    assert "cannot be written (File exists); texts are not kept" in capsys.readouterr().err
    os.unlink(folder)
    folder.mkdir()
    with locked(folder / "lock"), pytest.raises(InputError, match=f"process {os.getpid()} on .* is at work here"):
        generation.evaluate_generation(settings)
    assert generation.evaluate_generation(settings) == result


def test_steering_is_measured_beside_texts_that_were_not_asked(config, make_corpus, tmp_path):
    settings = config(steer=True, plans="none,soft")
    result = generation.evaluate_generation(settings)
    steering = result["steering"]
    texts = {name: tokens_by_document(tmp_path / "run", name) for name in ("none", "soft", "steered")}
    assert steering["selection"] == "soft" and texts["steered"] != texts["soft"]
    stored = json.loads((tmp_path / "run" / "generation_evaluation.json").read_text())["test"]
    assert stored["steering"] == json.loads(json.dumps(steering))
    kept = {
        name: {key: np.array(own) for key, own in stored["scores"][name].items()} for name in ("steered", "unsteered")
    }
    for name, own in kept.items():
        assert steering["sentences"][name] == own["complete"].sum()
        for of in ("hits", "ranks"):
            assert steering[of][name]["value"] == pytest.approx(own[of].sum() / max(own["complete"].sum(), 1))
    corpus = generation.PreparedCorpus.load(settings.corpus)
    share = corpus.action_counts.numpy() / corpus.action_counts.sum().item()
    assert steering["hits"]["chance"] == pytest.approx((share**2).sum()) and steering["ranks"]["chance"] == 4
    shown = format_generation(result)
    assert "Steering: " in shown and max(map(len, shown.splitlines())) <= 80
    tried = generation.evaluate_generation(EvaluateGenerationConfig(**vars(settings) | {"attempts": 3}))
    assert tried["steering"]["attempts"] == 3 and "actions, in 3 attempts" in " ".join(format_generation(tried).split())
    assert tried["steering"]["hits"]["unsteered"] == steering["hits"]["unsteered"] and tried["rows"] == result["rows"]
    again = tokens_by_document(tmp_path / "run", "steered")
    assert again != texts["steered"] and all(len(own) == settings.max_new_tokens for own in again.values())
    alone = generation.evaluate_generation(
        EvaluateGenerationConfig(**vars(settings) | {"plans": "none", "batch_size": 3})
    )
    assert alone["steering"] == steering and [row["plan"] for row in alone["rows"]] == ["none"]
    assert "steering" not in generation.evaluate_generation(
        EvaluateGenerationConfig(**vars(settings) | {"steer": False})
    )


def test_a_sentence_is_held_against_the_action_asked_for_it(lm_folder, encoder):
    """Sentences begun behind the prompt and complete, each with the rank of its action's centroid."""
    tokenizer = load_tokenizer(lm_folder("gpt2"))
    tracker = SentenceTracker(tokenizer, encoder)
    new = ["It was warm there.", "Boats stayed in.", "Nobody knew."]
    codebook = encoder.encode([new[2], new[0], new[1], "Rain fell."]).astype(np.float32)

    def ranks(prompt, text, asked):
        return follow(tokenizer(prompt).input_ids, tokenizer(text).input_ids, asked, tracker, codebook)

    assert ranks("The cat sat on the mat.", " " + " ".join(new) + " Rain fell", [1, 2, 0, 3]) == [1, 1, 1]
    others = ranks("The cat sat on the mat.", " " + " ".join(new), [2, 2, 3])
    assert len(others) == 3 and others[1] == 1 and min(others[0], others[2]) > 1 and max(others) <= 4
    assert ranks("The cat sat on", " the mat. Boats stayed in. Nobody", [3, 2, 0]) == [1], (
        "the first began in the prompt"
    )
    assert ranks("The cat sat on the mat.", " Nobody knew", [0]) == []


def test_shares_and_ranks_have_paired_intervals():
    rng = np.random.default_rng(0)
    steered = Following.of_ranks([[1] * int(rng.integers(1, 5)) + [3] for _ in range(50)])
    unsteered = Following.of_ranks([[4, 1], *[[5, 6]] * 48, []])
    found = compare_following(steered, unsteered, np.full(8, 1 / 8), resamples=200, seed=0)
    assert found["sentences"] == {"steered": int(steered.complete.sum()), "unsteered": 98}
    assert found["hits"]["unsteered"]["value"] == 1 / 98 and found["ranks"]["unsteered"]["value"] == (5 + 48 * 11) / 98
    for of, sign in (("hits", 1), ("ranks", -1)):
        difference = found[of]["difference"]
        assert difference["value"] == found[of]["steered"]["value"] - found[of]["unsteered"]["value"]
        low, high = difference["ci95"]
        assert low < difference["value"] < high and sign * low > 0 and difference["verdict"] == "better"
    turned = compare_following(unsteered, steered, np.full(8, 1 / 8), resamples=200, seed=0)
    assert turned["hits"]["difference"]["verdict"] == turned["ranks"]["difference"]["verdict"] == "worse"
    assert found["hits"]["chance"] == 1 / 8 and found["ranks"]["chance"] == 4.5
    few = compare_following(Following.of_ranks([[1]]), Following.of_ranks([[]]), np.ones(1), resamples=9, seed=0)
    assert few["hits"]["steered"] == {"value": 1.0, "ci95": None}


def test_a_model_that_plans_nothing_cannot_be_steered(config, lm_folder):
    settings = config(plans="none", steer=True)
    with pytest.raises(InputError, match=r"--steer: .* plans nothing; leave it out"):
        generation.evaluate_generation(EvaluateGenerationConfig(**vars(settings) | {"run": lm_folder("gpt2")}))


def test_a_plain_lm_is_measured_without_plan(config, lm_folder, tmp_path):
    settings = config(plans="none")
    before = sorted(os.listdir(lm_folder("gpt2")))
    plain = generation.evaluate_generation(EvaluateGenerationConfig(**vars(settings) | {"run": lm_folder("gpt2")}))
    assert sorted(os.listdir(lm_folder("gpt2"))) == before
    assert plain["rows"] == generation.evaluate_generation(settings)["rows"], "the LM was not trained"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plans": "none,oracle"}, "--plans none,oracle: expected some of soft, hard"),
        ({"plans": "none,shuffled"}, "--plans none,shuffled: expected some of soft, hard"),
        ({"plans": "soft"}, "--versus none: not among --plans soft"),
        ({"attempts": 2}, "--attempts 2: is for --steer"),
        ({"attempts": 2, "steer": True, "temperature": 0}, "--attempts 2: is for a --temperature above 0"),
        ({"plans": "none,top-k"}, "was not trained with --top-k"),
        ({"prompt_sentences": 12}, "no document of the test split has 20 tokens behind 12 sentences"),
        ({"max_new_tokens": 256}, "--max-new-tokens 256: the LM's context is 256 tokens; set less"),
        ({"split": "validation", "prompts": 9}, None),
    ],
)
def test_bad_options_are_refused(options, message, config, capsys):
    settings = config(**options)
    if message is None:
        assert len(find_prompts(load_corpus(settings), settings, 256)) < 9
        assert "only" in capsys.readouterr().err
        return
    with pytest.raises(InputError, match=message):
        generation.evaluate_generation(settings)


def test_the_command_starts_in_a_process_of_its_own(tmp_path):
    """What other tests have imported hides circles among imports."""
    command = [sys.executable, "-m", "planlm", "evaluate-generation", "run", "--corpus", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no prepared corpus" in done.stderr and len(done.stderr.splitlines()) == 1


def load_corpus(settings):
    return generation.PreparedCorpus.load(settings.corpus).split(settings.split)


def test_missing_packages_are_named(config, monkeypatch):
    monkeypatch.setattr(generation.measure, "_PACKAGES", ("no_such_package",))
    with pytest.raises(InputError, match=r"needs no_such_package: pip install 'planlm\[metrics\]'"):
        generation.evaluate_generation(config())
