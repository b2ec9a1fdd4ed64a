"""`planlm evaluate --forgetting`: what the LM has lost with the plan off, and against which LM."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from planlm import show
from planlm.config import EvaluateConfig
from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError
from planlm.evaluation.evaluate import evaluate
from planlm.evaluation.perplexity import score_documents
from planlm.evaluation.significance import paired_bootstrap
from planlm.model import PlanLMForCausalLM
from planlm.model.loading import load_model

OTHER = ["Nobody knew. Boats stayed in. It was warm there.", "It was warm there. Boats stayed in."] * 4


@pytest.fixture
def settings(make_corpus, make_run, lm_folder):
    """Of a run whose LM is as it was."""
    corpus, other = make_corpus("llama"), make_corpus("llama", "other", splits=("test",), test=OTHER)
    run = make_run(corpus, "llama")
    (run / "config.yaml").write_text(f"lm: {lm_folder('llama')}\n")
    return {
        "run": str(run), "corpus": str(corpus.path), "forgetting": str(other.path), "plans": "none,soft", "window": 24
    }  # fmt: skip


def change(run, by=0.05):
    """The run's model with another LM."""
    model = load_model(str(run))
    with torch.no_grad():
        for parameter in model.lm.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    shutil.rmtree(f"{run}/model")
    model.save_pretrained(f"{run}/model")


def test_a_frozen_lm_has_forgotten_nothing_to_the_last_bit(settings):
    result = evaluate(EvaluateConfig(**settings))
    found = result["forgetting"]
    for part in (found, found["trained_on"]):
        assert part["before"] == part["after"] and part["delta"] == 0 and part["ci95"] == [0, 0]
    assert found["documents"] == 8 and found["split"] == "test"
    assert found["trained_on"]["after"] == result["rows"][0]["nll"]
    assert found["trained_on"]["tokens"] == result["tokens"]


def test_figures_are_those_of_both_lms_and_are_kept(settings, lm_folder, make_corpus):
    change(settings["run"])
    config = EvaluateConfig(**settings)
    result = evaluate(config)
    other = make_corpus("llama", "again", splits=("test",), test=OTHER)
    base = PlanLMForCausalLM.from_lm(lm_folder("llama"), other.codebook)
    scores = [
        score_documents(model, other.split("test"), selections=["none"], window=24)["none"]
        for model in (base, load_model(settings["run"]))
    ]
    found = result["forgetting"]
    assert (found["before"], found["after"]) == pytest.approx([one.nll for one in scores], rel=1e-6)
    delta, interval = paired_bootstrap(scores[1], scores[0], resamples=config.bootstrap, seed=0)
    assert found["delta"] == pytest.approx(delta, rel=1e-4) and found["delta"] != 0
    np.testing.assert_allclose(found["ci95"], interval, rtol=1e-3)
    kept = json.loads(Path(settings["run"], "evaluation.json").read_text())["test"]["forgetting"]
    assert kept == found and kept["corpus"] == settings["forgetting"] and kept["base_lm"] == lm_folder("llama")
    text = show.evaluation(result, config)
    assert "perplexity with the plan off, before training and after" in text and "other, test" in text


def test_base_lm_is_named_or_that_of_the_corpus(settings, lm_folder, tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(lm_folder("llama"))
    torch.nn.init.normal_(lm.model.norm.weight)
    shutil.copytree(lm_folder("llama"), tmp_path / "lm")
    lm.save_pretrained(tmp_path / "lm")
    found = evaluate(EvaluateConfig(**settings, base_lm=str(tmp_path / "lm")))["forgetting"]
    assert found["delta"] != 0 and found["base_lm"] == str(tmp_path / "lm")
    config = Path(settings["run"], "config.yaml")
    config.write_text("lm: null\n")
    assert evaluate(EvaluateConfig(**settings))["forgetting"]["delta"] == 0
    config.unlink()
    with pytest.raises(InputError, match=r"has no config.yaml that names the LM it was; give it with --base-lm"):
        evaluate(EvaluateConfig(**settings))


def test_split_is_the_one_asked_for_or_all(settings, make_corpus):
    several = make_corpus("llama", "several", splits=("train", "test"))
    changes = {**settings, "forgetting": str(several.path), "split": "validation"}
    found = evaluate(EvaluateConfig(**changes))["forgetting"]
    assert (found["split"], found["documents"]) == ("all", 16)
    found = evaluate(EvaluateConfig(**changes, forgetting_split="train"))["forgetting"]
    assert (found["split"], found["documents"]) == ("train", 8)
    with pytest.raises(InputError, match=r"no documents in split 'validation'"):
        evaluate(EvaluateConfig(**changes, forgetting_split="validation"))


def test_mistakes_are_named(settings, make_corpus):
    foreign = make_corpus("gpt2", "foreign")
    with pytest.raises(InputError, match=r"--forgetting .*: prepared with the tokenizer of .* which is not that of"):
        evaluate(EvaluateConfig(**{**settings, "forgetting": str(foreign.path)}))
    with pytest.raises(InputError, match=r"--base-lm: is for --forgetting CORPUS"):
        evaluate(EvaluateConfig(**{**settings, "forgetting": None}, base_lm="lm"))


def test_a_run_may_have_gone_on_from_another(settings, make_corpus, make_run, tmp_path):
    """What it began with is then that run's LM, with the plan off."""
    shutil.copytree(settings["run"], tmp_path / "earlier")
    change(tmp_path / "earlier")
    (Path(settings["run"]) / "config.yaml").write_text(f"lm: {tmp_path / 'earlier'}\n")
    found = evaluate(EvaluateConfig(**settings))["forgetting"]
    scores = score_documents(
        load_model(str(tmp_path / "earlier")), PreparedCorpus.load(settings["forgetting"]).split("test"),
        selections=["none"], window=24,
    )  # fmt: skip
    assert found["before"] == pytest.approx(scores["none"].nll, rel=1e-6) and found["before"] != found["after"]
