"""Where the gain arises, sampled plans, temperatures and cost: against sums written out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from planlm.config import EvaluateConfig
from planlm.corpus.batches import PlanLoader
from planlm.errors import InputError
from planlm.evaluation.breakdown import POSITIONS
from planlm.evaluation.evaluate import evaluate
from planlm.evaluation.perplexity import Sampling, score_documents
from planlm.evaluation.significance import DocumentScores, paired_bootstrap
from planlm.model.loading import load_model
from planlm.show import evaluation as shown

LAST = (1, 2, 4, 8, 16, 32, 10**9)
"""The last sentence of each bucket, from 1."""


@torch.no_grad()
def token_scores(model, row):
    """NLL of each token of a document but the first, and the number from 1 of its sentence."""
    ids = torch.tensor(row["input_ids"])
    logits = model.lm(ids[None, :-1]).logits[0].double()
    nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").numpy()
    return nll, np.repeat(np.arange(len(row["sentence_tokens"])), row["sentence_tokens"])[1:] + 1


def test_sentences_are_counted_in_their_buckets(make_corpus, make_run):
    """Whatever window a token is scored in, its sentence's number in the document decides."""
    corpus = make_corpus(test=["It was warm there. " * count for count in (40, 1, 6, 3, 18, 2, 9, 5)])
    run = make_run(corpus)
    model, dataset = load_model(str(run)), corpus.split("test")
    scores = score_documents(model, dataset, selections=["none", "soft"], window=255, stride=255, batch_size=3)
    for document, row in enumerate(dataset):
        nll, number = token_scores(model, row)
        first = 0
        for bucket, last in enumerate(LAST):
            inside = (number > first) & (number <= last)
            assert scores["none"].position_tokens[document, bucket] == inside.sum()
            if len(row["input_ids"]) <= 256:
                np.testing.assert_allclose(
                    scores["none"].position_nll[document, bucket], nll[inside].sum(), rtol=1e-5, atol=1e-6
                )
            first = last
    narrow = score_documents(model, dataset, selections=["soft"], window=16, stride=5, batch_size=4)["soft"]
    assert np.array_equal(narrow.position_tokens, scores["soft"].position_tokens)
    for score in (narrow, *scores.values()):
        np.testing.assert_allclose(score.position_nll.sum(axis=1), score.nll_sum, rtol=1e-12)

    config = {"plans": "none,soft", "versus": "none", "window": 255, "batch_size": 3}
    result = evaluate(EvaluateConfig(run=str(run), corpus=str(corpus.path), **config))
    assert [part["bucket"] for part in result["by_position"]] == list(POSITIONS)
    parts = [DocumentScores(scores[plan].position_nll[:, 2], scores[plan].position_tokens[:, 2]) for plan in scores]
    delta, interval = paired_bootstrap(parts[1], parts[0])
    row = result["by_position"][2]["rows"][1]
    assert row["delta"] == pytest.approx(delta, rel=1e-6) and row["tokens"] == parts[0].tokens.sum()
    assert row["ci95"] == (None if interval is None else pytest.approx(interval, rel=1e-6))
    lengths = sorted(len(ids) - 1 for ids in dataset["input_ids"])
    buckets = [f"{low}-{high}" for low, high in zip(lengths[::2], lengths[1::2], strict=True)]
    assert [part["bucket"] for part in result["by_length"]] == buckets
    assert sum(part["rows"][0]["tokens"] for part in result["by_length"]) == result["tokens"] == sum(lengths)

    cost = result["cost"]
    assert sum(cost["parameters"].values()) == sum(parameter.numel() for parameter in model.parameters())
    assert cost["parameters"]["codebook"] == model.codebook.numel() and cost["selection"] == "soft"
    assert all(seconds > 0 for seconds in cost["seconds_per_1000_tokens"].values())
    text = shown(result, None)
    assert "33+" in text and "1,000" in text and max(map(len, text.splitlines())) <= 80


def test_sampled_plans_average_probabilities(make_corpus, make_run):
    """Many draws come near the mixture over all actions, a cold one is the most probable action's."""
    corpus = make_corpus("llama", test=["The cat sat on the mat. It was warm there. Boats stayed in."] * 2)
    model, dataset = load_model(str(make_run(corpus, "llama", plan_temperature=2.0))), corpus.split("test")
    batch = next(iter(PlanLoader(dataset, window=64, batch_size=2, shuffle=False)))
    with torch.no_grad():
        logits = model(batch.input_ids, shift_labels=batch.labels, plan=batch.plan, selection="soft").action_logits
        log_p = (logits.double() / 2).log_softmax(dim=-1)  # [S, K]
        terms = []
        for action in range(log_p.shape[1]):
            plan = replace(batch.plan, actions=torch.full_like(batch.actions, action))
            nll = model(batch.input_ids, shift_labels=batch.labels, plan=plan, selection="oracle").token_nll
            terms.append(log_p[batch.plan.segment_ids.clamp_min(0), action] - nll.double())
    exact = (-torch.stack(terms).logsumexp(dim=0)).where(batch.labels != -100, 0).sum(dim=1).numpy()

    def sampled(num_plans, seed=0, batch_size=2):
        how = {"window": 64, "batch_size": batch_size, "sampling": Sampling(num_plans, seed)}
        return score_documents(model, dataset, selections=["sampled", "hard", "soft"], **how)

    many = sampled(300)["sampled"].nll_sum
    np.testing.assert_allclose(many, exact, rtol=5e-3)
    few = [sampled(2)["sampled"].nll_sum, sampled(2, seed=1)["sampled"].nll_sum]
    assert abs(few[0] - exact).max() > abs(many - exact).max()
    assert not np.allclose(*few) and few[0][0] != few[0][1], "draws belong to seed and document"
    np.testing.assert_allclose(sampled(2, batch_size=1)["sampled"].nll_sum, few[0], rtol=1e-6)
    model.config.plan_temperature = 1e-4
    cold = sampled(3)
    np.testing.assert_allclose(cold["sampled"].nll_sum, cold["hard"].nll_sum, rtol=1e-6)


def test_a_temperature_is_that_of_the_model_trained_with_it(make_corpus, make_run):
    corpus = make_corpus()
    runs = {}
    for name, value in (("one", 1.0), ("two", 2.0)):
        torch.manual_seed(0)
        runs[name] = str(make_run(corpus, name=name, plan_temperature=value))
    asked = {"corpus": str(corpus.path), "plans": "soft,hard,sampled", "num_plans": 2, "versus": "hard"}
    first, second, own = (
        evaluate(EvaluateConfig(run=runs[name], temperature=temperature, **asked))
        for name, temperature in (("one", 2.0), ("two", None), ("one", None))
    )
    assert first["rows"] == second["rows"] and first["temperature"] == second["temperature"] == 2.0
    assert own["rows"][0]["nll"] != first["rows"][0]["nll"] and own["rows"][1] == first["rows"][1]
    with pytest.raises(InputError, match="--num-plans 3: is for the row sampled; add it to --plans"):
        evaluate(EvaluateConfig(run=runs["one"], corpus=str(corpus.path), num_plans=3))
