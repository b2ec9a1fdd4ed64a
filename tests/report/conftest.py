"""Made-up run directories."""

import json

import numpy as np
import pytest
import yaml

from planlm.evaluation.significance import DocumentScores, compare_rows
from planlm.report.generation import GENERATION_METRICS

PLANNER = {
    "accuracy@1": 0.278, "accuracy@5": 0.55, "accuracy@10": 0.692, "mrr": 0.4, "nll": 3.18,
    "ece": 0.03, "unigram_nll": 5.5, "unigram_accuracy@1": 0.05, "repeat_last_accuracy": 0.236,
    "sentences": 4120, "num_actions": 256,
}  # fmt: skip


def make_scores(shift, num_documents=40, seed=0):
    """Documents shared by every call with the same seed, made harder by about `shift` nats a token."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(100, 900, num_documents)
    difficulty = generator.normal(3.6, 0.3, num_documents)
    noise = np.random.default_rng(round(abs(shift) * 1e4)).normal(0, 0.01, num_documents) if shift else 0
    return DocumentScores((difficulty + shift + noise) * tokens, tokens)


def make_result(scores, versus="fixed", split="test", planner=PLANNER):
    rows = compare_rows(scores, versus)
    return {
        "run": "runs/soft", "split": split, "window": 1024, "stride": 512, "tokens": rows[0]["tokens"],
        "documents": rows[0]["documents"], "versus": versus, "rows": rows, "planner": planner,
    }  # fmt: skip


@pytest.fixture
def planner():
    """Metrics of a planner."""
    return dict(PLANNER)


@pytest.fixture
def result():
    """A table of perplexities, with one row far from the others and one that shows no difference."""
    shifts = {"none": 0.09, "fixed": 0.0, "uniform": 0.0001, "hard": -0.004, "soft <joint>": -0.008}
    return make_result({plan: make_scores(shift) for plan, shift in shifts.items()})


@pytest.fixture
def make_run(tmp_path):
    """Write a run directory with what is asked for."""

    def make(name, selection="soft", shift=-0.01, evaluated=("none", "fixed"), splits=("test",), lines=30, **files):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = {"corpus": "my corpus", "lm": "SmolLM2", "selection": selection, "lm_mode": "freeze", "lr": 1e-3}
        (folder / "config.yaml").write_text(yaml.safe_dump(config | files.pop("config", {})))
        metrics = [
            {"step": 10 * i, "loss": 4 - i / 50, "lm_loss": 4 - i / 50, "planner_loss": 3.0, "planner_accuracy": 0.2,
             "planner_entropy": None, "tokens_per_second": 6600.0, "seconds": 6.2 * i}
            for i in range(1, lines + 1)
        ]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        shifts = {"none": 0.09, "fixed": 0.0, selection: shift}
        scores = {plan: make_scores(shifts[plan]) for plan in dict.fromkeys((*evaluated, selection))}
        if evaluated:
            results = {
                split: make_result(scores, split=split)
                | {"scores": {"tokens": scores["fixed"].tokens.tolist(),
                              "nll": {plan: score.nll_sum.tolist() for plan, score in scores.items()}}}
                for split in splits
            }  # fmt: skip
            (folder / "evaluation.json").write_text(json.dumps(results))
        for file, content in files.items():
            (folder / f"{file}.json").write_text(json.dumps(content))
        return folder

    return make


@pytest.fixture
def described():
    """What `planlm actions` leaves in a corpus, of two actions."""
    share = {"sentences": 10, "share": 0.5}
    return {
        "actions": [
            {"action": 1, "label": "ships <i>", "terms": ["ship", "sea"], "examples": ["A <b>ship</b> sank."],
             "followed_by": [{"action": 1, "share": 0.7}, {"action": 0, "share": 0.3}], "position": [0.0, 1.0],
             **share},
            {"action": 0, "label": "", "terms": [], "examples": [], "followed_by": [], "position": [0.5, 0.0], **share},
        ]
    }  # fmt: skip


@pytest.fixture
def generated():
    """A result of `planlm evaluate-generation`, by split."""
    metrics = {key: 0.25 for key, _, _ in GENERATION_METRICS}
    differences = {key: {"delta": -0.125, "ci95": [-0.2, -0.1], "verdict": "better"} for key in metrics}
    rows = [{"plan": "fixed", "metrics": metrics, "differences": None},
            {"plan": "soft", "metrics": metrics | {"mauve": None}, "differences": differences}]  # fmt: skip
    about = {"prompts": 100, "split": "test", "max_new_tokens": 128, "prompt_sentences": 3, "temperature": 1.0,
             "top_p": 0.95, "seed": 0, "clusters": 10, "features": "MiniLM", "versus": "fixed"}  # fmt: skip
    value = {"value": 0.375, "ci95": [0.25, 0.5], "verdict": "better"}
    following = {"steered": value, "unsteered": value | {"ci95": None}, "difference": value, "chance": 0.125}
    steering = {
        "selection": "soft",
        "sentences": {"steered": 1234, "unsteered": 5},
        "hits": following,
        "ranks": following,
    }
    return {"test": about | {"rows": rows, "human": metrics, "steering": steering}}
