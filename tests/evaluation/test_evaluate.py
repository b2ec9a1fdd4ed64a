"""`planlm evaluate`: against plain transformers, what it writes, and every way to ask for the wrong thing."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Cache

from planlm.config import EvaluateConfig
from planlm.errors import InputError
from planlm.evaluation.evaluate import evaluate
from planlm.evaluation.perplexity import score_documents
from planlm.evaluation.significance import DocumentScores, compare_rows
from planlm.model.loading import load_model
from planlm.selections import SELECTIONS

EVERY_PLAN = [name for name, about in SELECTIONS.items() if not about.needs_top_k]


@torch.no_grad()
def plain_nll(folder, documents, window, stride):
    """Sum of NLL and number of tokens of each document, one window at a time, as transformers' page on perplexity."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores = []
    for ids in documents:
        total, scored = 0.0, 0  # tokens up to here, the first left aside, have been scored
        for begin in range(0, len(ids), stride):
            inputs = torch.tensor(ids[begin : begin + window])
            targets = torch.tensor(ids[begin + 1 : begin + window + 1])
            logits = lm(inputs[None]).logits[0, : len(targets)].double()
            nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            total += nll[max(0, scored - begin) :].sum().item()
            scored = begin + len(targets)
            if scored == len(ids) - 1:
                break
        scores.append((total, scored))
    return scores


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize(("window", "stride"), [(256, 256), (24, 24), (24, 7)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_plan_none_agrees_with_plain_transformers(family, window, stride, batch_size, lm_folder, make_corpus, make_run):
    corpus = make_corpus(family)
    config = EvaluateConfig(
        run=str(make_run(corpus, family)), corpus=str(corpus.path), plans="none", window=window, stride=stride,
        batch_size=batch_size,
    )  # fmt: skip
    row = evaluate(config)["rows"][0]
    expected = plain_nll(lm_folder(family), corpus.split("test")["input_ids"], window, stride)
    nll, tokens = (sum(part) for part in zip(*expected, strict=True))
    assert row["tokens"] == tokens == sum(len(ids) - 1 for ids in corpus.split("test")["input_ids"])
    assert row["nll"] == pytest.approx(nll / tokens, rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)


def test_documents_are_scored_apart_and_in_the_order_of_the_split(lm_folder, make_corpus, make_run):
    corpus = make_corpus()
    model = load_model(str(make_run(corpus)))
    scores = score_documents(model, corpus.split("test"), selections=["none"], window=32, batch_size=5)["none"]
    expected = plain_nll(lm_folder("gpt2"), corpus.split("test")["input_ids"], 32, 32)
    np.testing.assert_allclose(scores.nll_sum, [nll for nll, _ in expected], rtol=1e-5)
    assert scores.tokens.tolist() == [tokens for _, tokens in expected]


def test_plans_in_one_pass_are_the_plans_one_by_one_whatever_the_batch(make_corpus, make_run):
    corpus = make_corpus("llama")
    model, dataset = load_model(str(make_run(corpus, "llama"))).train(), corpus.split("test")
    together = score_documents(model, dataset, selections=EVERY_PLAN, window=24, stride=16, batch_size=4)
    assert model.training
    for plan in EVERY_PLAN:
        alone = score_documents(model, dataset, selections=[plan], window=24, stride=16, batch_size=1)[plan]
        np.testing.assert_allclose(alone.nll_sum, together[plan].nll_sum, rtol=2e-6, err_msg=plan)
    repeated = score_documents(model, dataset, selections=EVERY_PLAN, window=24, stride=16, batch_size=4)
    for plan in EVERY_PLAN:
        assert np.array_equal(repeated[plan].nll_sum, together[plan].nll_sum)
    # docs/method.md: in evaluation the noisy selections are soft, and the straight-through one is hard.
    assert np.array_equal(together["gumbel"].nll_sum, together["soft"].nll_sum)
    assert np.array_equal(together["straight-through"].nll_sum, together["hard"].nll_sum)
    distinct = [together[plan].nll for plan in ("none", "fixed", "uniform", "hard", "soft", "oracle")]
    assert len(set(distinct)) == len(distinct)


@pytest.mark.parametrize("conditioning", ["adapter", "insert"])
def test_keys_and_values_are_not_kept(conditioning, make_corpus, make_run, monkeypatch):
    """They would take memory and, of inserted plans, a column in all rows for each that any row has."""
    corpus = make_corpus("llama")
    model = load_model(str(make_run(corpus, "llama", conditioning=conditioning)))
    filled, update = [], Cache.update
    monkeypatch.setattr(Cache, "update", lambda *call, **more: filled.append(call[3]) or update(*call, **more))
    model(torch.arange(8)[None])
    assert filled, "which calls that do not say otherwise fill"
    filled.clear()
    scores = score_documents(model, corpus.split("test"), selections=["none", "soft"], window=24, batch_size=4)
    assert not filled and min(row.nll_sum.sum() for row in scores.values()) > 0


def test_a_document_of_one_token_has_nothing_scored_and_stays_in_place(make_corpus, make_run):
    corpus = make_corpus(test=["The cat sat.", "T", "It was warm there."])
    model = load_model(str(make_run(corpus)))
    scores = score_documents(model, corpus.split("test"), selections=["soft"], window=32)["soft"]
    assert scores.tokens[1] == 0
    assert scores.nll_sum[1] == 0
    assert (scores.tokens[[0, 2]] > 0).all()


def test_result_is_json_and_splits_stand_side_by_side_on_disk(make_corpus, make_run):
    corpus = make_corpus()
    run = make_run(corpus)
    results = {
        split: evaluate(EvaluateConfig(run=str(run), corpus=str(corpus.path), split=split, plans="none,fixed,soft"))
        for split in ("validation", "test")
    }
    stored = json.loads((run / "evaluation.json").read_text())
    assert stored.keys() == {"validation", "test"}
    for split, result in results.items():
        assert json.loads(json.dumps(result)) == result
        scores = stored[split].pop("scores")
        assert stored[split] == result
        assert [row["plan"] for row in result["rows"]] == ["none", "fixed", "soft"]
        assert result["rows"][1]["ci95"] is None
        assert len(result["rows"][2]["ci95"]) == 2
        assert (result["window"], result["stride"], result["documents"]) == (256, 256, 8)
        assert result["planner"]["sentences"] == sum(len(actions) for actions in corpus.split(split)["actions"])
        tokens = np.array(scores["tokens"])
        rebuilt = {plan: DocumentScores(np.array(nll), tokens) for plan, nll in scores["nll"].items()}
        assert compare_rows(rebuilt, "fixed") == result["rows"]


def test_a_model_folder_is_evaluated_and_left_as_it_was(make_corpus, make_run):
    corpus = make_corpus()
    folder = make_run(corpus) / "model"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    result = evaluate(EvaluateConfig(run=str(folder), corpus=str(corpus.path), plans="soft", max_documents=3))
    assert result["documents"] == 3
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_plain_lm_is_measured_without_plans_only(lm_folder, make_corpus, make_run):
    corpus = make_corpus()
    plain = evaluate(EvaluateConfig(run=lm_folder("gpt2"), corpus=str(corpus.path), plans="none"))
    joint = evaluate(EvaluateConfig(run=str(make_run(corpus)), corpus=str(corpus.path), plans="none"))
    assert plain["rows"][0]["nll"] == joint["rows"][0]["nll"]
    assert plain["planner"] is None
    with pytest.raises(InputError, match="gpt2 model, not a joint model"):
        evaluate(EvaluateConfig(run=lm_folder("gpt2"), corpus=str(corpus.path), plans="none,soft"))


def test_without_the_default_reference_the_first_row_takes_its_place_and_that_is_said(make_corpus, make_run, capsys):
    corpus = make_corpus()
    result = evaluate(EvaluateConfig(run=str(make_run(corpus)), corpus=str(corpus.path), plans="soft, hard"))
    assert result["versus"] == "soft"
    assert result["rows"][0]["verdict"] == "reference"
    assert "differences refer to soft" in capsys.readouterr().err


def test_unknown_plans_and_references_are_named_together():
    with pytest.raises(InputError) as caught:
        evaluate(EvaluateConfig(run="r", corpus="c", plans="soft,greedy", versus="none"))
    assert "--plans soft,greedy: expected some of soft, hard" in str(caught.value)
    assert "--versus none: not among --plans" in str(caught.value)
    with pytest.raises(InputError, match="--plans ,: expected some of"):
        evaluate(EvaluateConfig(run="r", corpus="c", plans=","))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 257}, "--window 257: the LM's context is 256 tokens"),
        ({"window": 16, "stride": 17}, "--stride 17: larger than the window of 16"),
        ({"plans": "soft,top-k"}, "was not trained with --top-k"),
        ({"split": "validation"}, "no documents in split 'validation'"),
        ({"run": "nowhere"}, "nowhere: no trained model"),
        ({"corpus": "nowhere"}, "nowhere: no prepared corpus"),
    ],
)
def test_wrong_requests_end_in_one_line(options, message, make_corpus, make_run):
    corpus = make_corpus(splits=("train", "test"))
    with pytest.raises(InputError, match=message) as caught:
        evaluate(EvaluateConfig(**{"run": str(make_run(corpus)), "corpus": str(corpus.path), **options}))
    assert "\n" not in str(caught.value)


def test_a_corpus_of_another_tokenizer_is_refused(make_corpus, make_run):
    corpus, other = make_corpus("gpt2"), make_corpus("llama", name="other")
    with pytest.raises(InputError, match=r"other: prepared with the tokenizer of .*--tokenizer"):
        evaluate(EvaluateConfig(run=str(make_run(corpus)), corpus=str(other.path)))


def test_a_corpus_of_other_actions_is_refused(make_corpus, make_run):
    corpus, other = make_corpus(), make_corpus(name="other", num_actions=5)
    with pytest.raises(InputError, match=r"trained on other actions than those of .*other"):
        evaluate(EvaluateConfig(run=str(make_run(corpus)), corpus=str(other.path)))


def test_damaged_results_are_named_before_the_work_and_not_overwritten(make_corpus, make_run):
    corpus = make_corpus()
    run = make_run(corpus)
    (run / "evaluation.json").write_text("{")
    with pytest.raises(InputError, match=r"evaluation\.json: not valid JSON"):
        evaluate(EvaluateConfig(run=str(run), corpus=str(corpus.path)))
    assert (run / "evaluation.json").read_text() == "{"


def test_nothing_to_score_is_said(make_corpus, make_run):
    corpus = make_corpus(test=["T"])
    with pytest.raises(InputError, match="no document of the test split has a token to score"):
        evaluate(EvaluateConfig(run=str(make_run(corpus)), corpus=str(corpus.path)))


@pytest.mark.parametrize(
    ("value", "reason"),
    [(math.nan, r"not finite numbers \(lm\.transformer\.ln_f\.weight\)"), (1e9, "diverged, NLL is .* under plan none")],
)
def test_a_diverged_model_is_named_and_nothing_is_written(value, reason, make_corpus, make_run):
    corpus = make_corpus()
    run = make_run(corpus)
    model = load_model(str(run))
    with torch.no_grad():
        model.lm.transformer.ln_f.weight.fill_(value)
    model.save_pretrained(run / "model")
    with pytest.raises(InputError, match=reason):
        evaluate(EvaluateConfig(run=str(run), corpus=str(corpus.path), plans="none"))
    assert not (run / "evaluation.json").exists()
