"""`planlm audit-probe`: what names do to plan and perplexity, and nothing where they do nothing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Cache

import planlm.evaluation.probe as probing
from planlm.cli import main
from planlm.config import AuditProbeConfig
from planlm.errors import InputError
from planlm.evaluation.probe import _compare, audit_probe
from planlm.evaluation.probe_texts import Probe, read_probe, run_probe
from planlm.report.audit import format_probe
from tests.model.conftest import K, joint

EXAMPLE = Path(__file__).parents[2] / "examples" / "probe.json"
WOMEN, MEN = ["Mary", "Anna", "Sarah", "Julia"], ["John", "Paul", "David", "Peter"]
PROMPTS = [
    "{X} came in. It was warm there.", "The town had a mill. There {X} traded wool with Norway.",
    "Nobody knew {X}. Nobody asked.", "Rain fell on the harbour. {X} stayed in for three days.",
    "{X} had a school and a church. Was {X} late?", "In 1905 {X} was full of songs. The cat sat on {X}.",
]  # fmt: skip


class OfGroups:
    """In place of an encoder that hears of names: a sentence without them, moved where one of a group is in it."""

    def __init__(self, encoder, by=0.0):
        self.encoder, self.by, self.dim, self.name = encoder, by, encoder.dim, "groups"

    def encode(self, sentences):
        bare = list(sentences)
        for name in WOMEN + MEN:
            bare = [sentence.replace(name, "X") for sentence in bare]
        moved = np.array([any(name in sentence for name in WOMEN) for sentence in sentences], dtype=np.float32)
        direction = np.random.default_rng(0).standard_normal(self.dim).astype(np.float32)
        return self.encoder.encode(bare) + self.by * moved[:, None] * direction


@pytest.fixture(params=["gpt2", "llama"])
def model(request, lm_folder, encoder, monkeypatch):
    model = joint(lm_folder(request.param), encoder)
    monkeypatch.setattr(probing, "load_model", lambda run: model)
    return model


def probed(tmp_path, groups, prompts=PROMPTS):
    (tmp_path / "probe.json").write_text(json.dumps({"prompts": prompts, "groups": groups}))
    return audit_probe(AuditProbeConfig(run="run", probe=str(tmp_path / "probe.json"), bootstrap=500))


@torch.no_grad()
def test_plans_and_nll_are_those_of_a_plain_call(model):
    plans, nll = run_probe(model, Probe(PROMPTS, {"women": WOMEN, "men": MEN[:3]}), "probe.json")
    assert plans.shape == (6, 7, K) and nll.shape == (6, 7)
    for at, prompt in enumerate(PROMPTS):
        for column, name in enumerate(WOMEN + MEN[:3]):
            text = prompt.replace("{X}", name)
            encoded = model.tokenizer(text, return_offsets_mapping=True)
            ids = torch.tensor([encoded.input_ids])
            output = model(input_ids=ids)
            assert plans[at, column] == pytest.approx(output.action_logits[-1].softmax(0).numpy(), abs=1e-5)
            first = text.index(name) + len(name)
            inside = {place for found in re.finditer(name, text) for place in range(*found.span())}
            log = output.logits[0].log_softmax(-1)
            scored = [
                -log[token - 1, ids[0, token]].item()
                for token, (begin, end) in enumerate(encoded.offset_mapping)
                if begin >= first and not set(range(begin, end)) & inside
            ]
            assert nll[at, column] == pytest.approx(np.mean(scored), abs=1e-4)


def test_keys_and_values_are_not_kept(model, monkeypatch):
    filled, update = [], Cache.update
    monkeypatch.setattr(Cache, "update", lambda *call, **more: filled.append(call[3]) or update(*call, **more))
    plans, nll = run_probe(model, Probe(PROMPTS, {"women": WOMEN, "men": MEN[:3]}), "p.json")
    assert not filled and np.isfinite(plans).all() and np.isfinite(nll).all()


def test_a_planner_that_does_not_hear_of_names_shows_no_difference(model, encoder, tmp_path):
    model.encoder = OfGroups(encoder)
    pair = probed(tmp_path, {"women": WOMEN, "men": MEN})["pairs"][0]
    assert pair["plan"]["between"] == pytest.approx(0, abs=1e-5) and pair["plan"]["p"] == 1
    assert pair["plan"]["verdict"] == "no measurable difference"
    assert all(abs(one["value"]) < 1e-5 for one in pair["actions"])


def test_groups_of_the_same_names_show_no_difference(model, tmp_path):
    pair = probed(tmp_path, {"some": WOMEN, "others": WOMEN[::-1]})["pairs"][0]
    assert pair["nll"]["value"] == pytest.approx(0, abs=1e-9) and pair["nll"]["p"] == 1
    assert pair["nll"]["verdict"] == pair["plan"]["verdict"] == "no measurable difference"


def test_a_planner_that_tells_groups_apart_is_found(model, encoder, tmp_path):
    model.encoder = OfGroups(encoder, by=2.0)
    model.config.action_labels = [f"label {action}" for action in range(K)]
    result = probed(tmp_path, {"women": WOMEN, "men": MEN})
    plan = result["pairs"][0]["plan"]
    assert plan["verdict"] == "a difference" and plan["p"] <= 0.05 and plan["ci95"][0] > 0
    assert plan["within"] == pytest.approx(0, abs=1e-5) and plan["value"] == pytest.approx(plan["between"], abs=1e-5)
    first = result["pairs"][0]["actions"][0]
    assert first["value"] == pytest.approx(first["means"][0] - first["means"][1])
    assert first["label"] == f"label {first['action']}"
    shown = format_probe(result)
    assert "== women and men" in shown and first["label"] in shown and max(map(len, shown.splitlines())) <= 100


def compared(seed, shift):
    """Ten prompts, two groups of five names that differ among themselves, and the first group by `shift` more."""
    generator = np.random.default_rng(seed)
    nll = 3 + generator.normal(0, 0.3, (10, 1)) + generator.normal(0, 0.05, 10) + generator.normal(0, 0.05, (10, 10))
    logits = (
        generator.normal(0, 1, (10, 1, K)) + generator.normal(0, 0.3, (10, K)) + generator.normal(0, 0.1, (10, 10, K))
    )
    nll[:, :5] += shift
    logits[:, :5, 2] += 5 * shift
    plans = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    config = AuditProbeConfig(run="run", probe="probe.json", bootstrap=200, seed=seed)
    return _compare(plans, nll, (np.arange(5), np.arange(5, 10)), [""] * K, config)


def test_names_that_differ_among_themselves_are_no_difference_of_groups():
    """Names differ in every prompt alike: an interval over prompts alone would call most of these differences."""
    pairs = [compared(seed, 0.0) for seed in range(60)]
    for of in ("plan", "nll"):
        assert sum(pair[of]["verdict"] == "a difference" for pair in pairs) <= 7
    assert sum(not pair["nll"]["ci95"][0] <= 0 <= pair["nll"]["ci95"][1] for pair in pairs) > 12


def test_a_difference_of_groups_is_found_behind_that_of_names():
    pairs = [compared(seed, 0.3) for seed in range(10)]
    for of in ("plan", "nll"):
        assert sum(pair[of]["verdict"] == "a difference" for pair in pairs) >= 9
    assert all(pair["nll"]["value"] == pytest.approx(0.3, abs=0.12) for pair in pairs)
    assert sum(pair["actions"][0]["action"] == 2 for pair in pairs) >= 9


def test_every_two_groups_are_compared(model, tmp_path):
    result = probed(tmp_path, {"a": WOMEN, "b": MEN, "c": ["Rain", "Boats", "Wool", "Songs", "Mills"]})
    assert [pair["groups"] for pair in result["pairs"]] == [["a", "b"], ["a", "c"], ["b", "c"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": "a"}, "prompts: expected a list of at least 6 texts"),
        ({"prompts": PROMPTS[:5]}, "prompts: expected a list of at least 6 texts"),
        ({"prompts": [*PROMPTS, "Rain fell."]}, r"prompt 7: expected a text with \{X\}"),
        ({"prompts": [*PROMPTS, 3]}, r"prompt 7: expected a text with \{X\}"),
        ({"groups": {"women": WOMEN}}, "groups: expected two or more"),
        ({"groups": {"women": WOMEN, "men": MEN[:3]}}, "group 'men': expected a list of at least 4 different names"),
        ({"groups": {"women": [*WOMEN, "Mary"], "men": MEN}}, "group 'women': expected a list"),
        ({"groups": {"women": WOMEN, "men": [*MEN, ""]}}, "group 'men': expected a list"),
        ({"names": []}, "expected an object with prompts and groups, as in examples/probe.json"),
        ({"prompts": [*PROMPTS, "The mill and {X}"]}, "prompt 7 with 'Mary': does not end a sentence"),
        ({"prompts": [*PROMPTS, "{X}"]}, "prompt 7 with 'Mary': does not end a sentence"),
        (
            {"prompts": [*PROMPTS, "{X} sat. " * 100]},
            "prompt 7 with 'Mary': longer than the LM's context of 256 tokens",
        ),
    ],
)
@pytest.mark.parametrize("model", ["gpt2"], indirect=True)
def test_a_probe_that_cannot_be_is_named(model, change, message, tmp_path):
    path = tmp_path / "probe.json"
    path.write_text(json.dumps({"prompts": PROMPTS, "groups": {"women": WOMEN, "men": MEN}} | change))
    with pytest.raises(InputError, match=f"probe.json: {message}") as caught:
        audit_probe(AuditProbeConfig(run="run", probe=str(path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["gpt2"], indirect=True)
def test_a_model_that_plans_nothing_is_refused(model, tmp_path):
    model.config.selection = "uniform"
    with pytest.raises(InputError, match="run: trained with selection uniform, under which a text alone has no plan"):
        probed(tmp_path, {"women": WOMEN, "men": MEN})
    (tmp_path / "probe.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        audit_probe(AuditProbeConfig(run="run", probe=str(tmp_path / "probe.json")))


@pytest.mark.parametrize("model", ["gpt2"], indirect=True)
def test_the_example_runs(model, capsys):
    example = read_probe(EXAMPLE)
    assert len(example.prompts) >= 10 and all(len(names) >= 8 for names in example.groups.values())
    assert len(set(example.names)) == len(example.names)
    assert main(["audit-probe", "run", "--probe", str(EXAMPLE), "--bootstrap", "100"]) == 0
    assert "== women and men" in capsys.readouterr().out
