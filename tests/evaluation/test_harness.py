"""lm-evaluation-harness, where it is installed: scores do not depend on the batch, and they are `planlm evaluate`'s."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planlm.evaluation.perplexity import score_documents
from planlm.model import PlanLMForCausalLM

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm_eval)")

TEXTS = [
    "In 1905 the town was 3.5 km from St. Mary. It had a mill, a school and a church.",
    "The cat sat on the mat. It was warm there. Rain fell on the harbour for three days. Boats stayed in.",
    "Was he late? Nobody knew. Its people traded wool with the U.S. and with Norway.",
    "Nobody asked. The mill is 3.5 km from the harbour and",  # token by token "3." would end a sentence
]
CHOICES = [" The cat sat.", " Boats stayed in the harbour. It was warm.", " and"]


@pytest.fixture
def corpus(make_corpus: Callable[..., Any]) -> Any:
    """Its tokenizer puts a start token before every text, as the harness does: the first token is scored too."""
    return make_corpus("llama", test=TEXTS)


@pytest.fixture
def model(corpus: Any, make_run: Callable[..., Path], encoder: Any) -> PlanLMForCausalLM:
    loaded = PlanLMForCausalLM.from_pretrained(make_run(corpus, "llama") / "model").eval()
    loaded.encoder = encoder
    return loaded


def harness(model: PlanLMForCausalLM, batch_size: int, add_bos_token: bool | None = None) -> Any:
    """The harness' own class for transformers' models."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=batch_size, add_bos_token=add_bos_token)


def requests(kind: str, arguments: list[tuple[str, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def test_likelihoods_do_not_depend_on_the_batch(model: PlanLMForCausalLM) -> None:
    pairs = requests("loglikelihood", [(text, choice) for text in TEXTS for choice in CHOICES])
    alone, together = (np.array(harness(model, size).loglikelihood(pairs))[:, 0] for size in (1, 8))
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_likelihoods_depend_on_the_plan(model: PlanLMForCausalLM) -> None:
    pairs = requests("loglikelihood", [(text, choice) for text in TEXTS for choice in CHOICES])
    planned = np.array(harness(model, 8).loglikelihood(pairs))[:, 0]
    model.config.selection = "none"
    assert np.abs(planned - np.array(harness(model, 8).loglikelihood(pairs))[:, 0]).max() > 0.01


@pytest.mark.parametrize("batch_size", [1, 8])
def test_rolling_likelihood_is_the_nll_of_evaluate(corpus: Any, model: PlanLMForCausalLM, batch_size: int) -> None:
    # The harness puts a start token before the text itself, and would score a second one.
    rolling = harness(model, batch_size, add_bos_token=False).loglikelihood_rolling(
        requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    )
    scores = score_documents(model, corpus.split("test"), selections=["soft"], window=256)["soft"]
    np.testing.assert_allclose(-np.array(rolling), scores.nll_sum, rtol=1e-4)  # embeddings are kept in float16


def test_a_task_of_ones_own_is_scored(model: PlanLMForCausalLM, tmp_path: Path) -> None:
    """A multiple-choice task of a local file, through the harness' own evaluator, in batches of 1 and 8."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [{"text": text, "choices": CHOICES, "label": number % 3} for number, text in enumerate(TEXTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{tmp_path}/rows.jsonl'}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: choices\n"
        "doc_to_target: label\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = []
    for batch_size in (1, 8):
        result = simple_evaluate(
            harness(model, batch_size), tasks=["own"], task_manager=tasks, bootstrap_iters=0, log_samples=True
        )
        found.append([[float(score[0][0]) for score in sample["resps"]] for sample in result["samples"]["own"]])
        assert 0 <= result["results"]["own"]["acc,none"] <= 1
    assert np.shape(found[0]) == (len(TEXTS), len(CHOICES))
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)
