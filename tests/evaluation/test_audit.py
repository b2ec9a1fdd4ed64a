"""`planlm audit`: no drift where there is none, and what was put into a trail is found in it."""

import itertools
import json

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.spatial.distance import jensenshannon

import planlm.evaluation.generation as evaluation
import planlm.model.generation as generation
from planlm.cli import main
from planlm.config import AuditConfig, GenerateConfig
from planlm.corpus.labels import write_labels
from planlm.errors import InputError
from planlm.evaluation.audit import audit
from planlm.evaluation.drift import Sequences, distances, drift
from planlm.model.loading import load_model, model_checksum
from planlm.model.planner import codebook_fingerprint
from planlm.report.audit import format_audit
from tests.evaluation.conftest import SENTENCES, K, make_texts


@pytest.fixture
def corpus(make_corpus, encoder, monkeypatch):
    monkeypatch.setattr(evaluation, "SentenceEncoder", lambda name, precision: encoder)
    return make_corpus(train=make_texts("train") * 5)


@pytest.fixture
def write(corpus, tmp_path):
    """Write a trail of texts, lists of sentences; `fields` are of every line. Its path."""
    shares = (corpus.action_counts / corpus.action_counts.sum()).tolist()

    def make(texts, name="audit.jsonl", **fields):
        about = {"format": 1, "finished": True, "forced": None, "plan": shares, "model": "m"}
        about |= {"corpus": corpus.fingerprint, "codebook": codebook_fingerprint(corpus.codebook)}
        lines = [
            json.dumps(
                about | {"text": f"{name}-{text}", "number": number, "place": number, "sentence": sentence} | fields
            )
            for text, sentences in enumerate(texts)
            for number, sentence in enumerate(sentences)
        ]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    return make


def found(corpus, *files, **options):
    return audit(AuditConfig(files=files, corpus=str(corpus.path), bootstrap=200, **options))


def own_texts(corpus, count, seed=0):
    """Documents of the corpus itself, as lists of sentences."""
    rows = corpus.split("train")
    chosen = np.random.default_rng(seed).integers(len(rows), size=count).tolist()
    return [[rows[at]["text"][begin:end] for begin, end in rows[at]["sentence_spans"]] for at in chosen]


def test_texts_of_the_corpus_have_not_drifted(corpus, write):
    result = found(corpus, write(own_texts(corpus, 40)))
    for name in ("written", "planned"):
        for distance in ("total_variation", "jensen_shannon"):
            one = result["drift"][name][distance]
            assert one["verdict"] == "no more than chance" and one["p"] > 0.05 and one["value"] <= one["chance95"]
    assert result["drift"]["planned"]["total_variation"]["value"] == pytest.approx(0, abs=1e-6)
    assert result["entropy"]["value"] == pytest.approx(result["unigram_entropy"], abs=1e-6)
    assert result["texts"] == 40 and result["models"][0]["texts"] == 40 and result["damaged"] == []


def test_a_shift_is_found_with_its_action_and_its_size(corpus, write):
    labels = [f"label {action}" for action in range(K)]
    write_labels(corpus.path, labels)
    texts = own_texts(corpus, 40)
    row = corpus.split("train")[0]
    begin, end = row["sentence_spans"][0]
    shifted, action = row["text"][begin:end], row["actions"][0]
    result = found(corpus, write([[*text, *[shifted] * len(text)] for text in texts]))
    moved, unmoved = result["drift"]["written"], result["drift"]["planned"]
    assert moved["total_variation"]["verdict"] == moved["jensen_shannon"]["verdict"] == "drift"
    assert moved["total_variation"]["p"] == pytest.approx(1 / 201)
    assert moved["total_variation"]["chance95"] < moved["total_variation"]["value"]
    risen = moved["actions"][0]
    assert risen["action"] == action and risen["label"] == labels[action]
    assert risen["change"] == pytest.approx((1 - risen["corpus"]) / 2, abs=0.05) and risen["ci95"][0] > 0
    assert risen["change"] > moved["change95"]
    assert [one["change"] for one in moved["actions"]] == sorted(
        (one["change"] for one in moved["actions"]), reverse=True
    )
    assert unmoved["total_variation"]["verdict"] == "no more than chance"
    shown = format_audit(result)
    assert f"{action} (label {action})" in shown and max(map(len, shown.splitlines())) <= 80


def test_what_the_planner_was_not_left_to_choose_does_not_count(corpus, write):
    surely = np.eye(K)[3].tolist()
    free, forced = write([["A b."] * 3] * 8), write([["A b."] * 5] * 8, "forced.jsonl", plan=surely, forced=3)
    result = found(corpus, free, forced)
    assert result["drift"]["planned"]["sentences"] == 24 and result["drift"]["written"]["sentences"] == 64
    assert result["entropy"]["value"] == pytest.approx(result["unigram_entropy"], abs=1e-6)
    result = found(corpus, write([["A b."] * 2] * 8, plan=surely))
    assert result["drift"]["planned"]["total_variation"]["verdict"] == "drift" and result["entropy"]["value"] == 0


def test_repetition_and_entropy_are_as_counted_by_hand(corpus, write):
    flat = [1 / K] * K
    texts = [["One two.", "one  Two.", "Three four five."], [SENTENCES[0]], [SENTENCES[0], SENTENCES[0]]]
    result = found(corpus, write(texts, plan=flat))
    assert result["repeated"] == {"value": 2 / 6, "ci95": None}, "two stand in their text before; three texts are few"
    assert result["entropy"]["value"] == pytest.approx(np.log(K))
    assert result["distinct"][0]["value"] == pytest.approx((5 / 7 + 5 / 6 + 5 / 12) / 3)
    documents = corpus.split("train")["actions"]
    pairs = [one == other for document in documents for one, other in itertools.pairwise(document)]
    assert result["corpus_same_action"] == pytest.approx(np.mean(pairs))
    actions = Sequences(np.array([1, 1, 1, 2, 2, 5]), np.array([2, 3, 1]))
    same, neighbours = actions.repeats()
    assert same.tolist() == [1, 1, 0] and neighbours.tolist() == [1, 2, 0]


def test_nothing_planned_and_nothing_finished_is_no_figure(corpus, write):
    result = found(corpus, write([["A b."]] * 3, plan=None, finished=False))
    assert result["drift"] == {"written": None, "planned": None}
    assert result["entropy"] is result["same_action"] is result["repeated"] is None
    assert "3 sentences of 3 texts" in format_audit(result)


def test_damaged_lines_are_named_and_left_out(corpus, write, tmp_path, capsys):
    path = tmp_path / "audit.jsonl"
    write([["One."], ["Two."]])
    first, second = map(json.loads, path.read_text().splitlines())
    damaged = [
        '{"text": "half a li', "[1]", json.dumps(first | {"format": 2}), json.dumps(first | {"finished": 1}),
        json.dumps(second | {"number": 7, "plan": [0.5] * K}), json.dumps(second | {"number": 8, "plan": [1.0]}),
        json.dumps(second | {"number": 9, "plan": ["a"] * K}), json.dumps(first | {"sentence": "Else."}),
        "[" * 100_000, json.dumps(first | {"number": 3, "sentence": "\ud800"}), json.dumps(first | {"corpus": 0}),
    ]  # fmt: skip
    path.write_bytes(b"\n".join([json.dumps(first).encode(), *map(str.encode, damaged), b"\xff", b"", b""]))
    with open(path, "a") as file:
        file.write(f"{json.dumps(second)}\n{json.dumps(second | {'time': 'later'})}\n")  # the same call again
    result = found(corpus, str(path))
    assert result["texts"] == result["sentences"] == 2
    assert [one["line"] for one in result["damaged"]] == list(range(2, 14))
    reasons = [one["reason"] for one in result["damaged"]]
    plan = f"plan is not a distribution over {K} actions"
    assert reasons == [
        "not JSON", "not a line of an audit of format 1", "not a line of an audit of format 1", "finished is 1",
        plan, plan, plan, "sentence 0 of text audit.jsonl-0 a second time", "not JSON",
        "sentence holds half of a character", "corpus is 0, place 0", "not JSON",
    ]  # fmt: skip
    err = capsys.readouterr().err
    assert f"{path}:2: not JSON; left out" in err and "2 more damaged lines left out" in err


def test_another_corpus_is_refused(corpus, write):
    with pytest.raises(InputError, match=r"audit.jsonl:1: its model was trained on another corpus .*c0ffee, not"):
        found(corpus, write([["One."]], corpus="c0ffee"))
    with pytest.raises(InputError, match=r"trained on another corpus .*abc, not"):
        found(corpus, write([["One."]], corpus=None, codebook="abc"))
    assert found(corpus, write([["One."]], corpus=None))["texts"] == 1
    with pytest.raises(InputError, match=r"audit.jsonl: no line of an audit"):
        found(corpus, write([]))
    with pytest.raises(InputError, match=r"no line of an audit \(.*audit.jsonl:1: finished is 3\)"):
        found(corpus, write([["One."]], finished=3))


def test_what_generate_writes_down_can_be_audited(corpus, make_run, encoder, monkeypatch, tmp_path, capsys):
    run = make_run(corpus)
    (run / "identity.json").write_text(json.dumps({"corpus": corpus.fingerprint}))
    model = load_model(str(run))
    model.encoder = encoder
    monkeypatch.setattr(generation, "load_model", lambda run: model)
    (tmp_path / "prompts.txt").write_text("\n".join(SENTENCES))
    config = {"run": str(run), "prompts": str(tmp_path / "prompts.txt"), "audit": str(tmp_path / "a.jsonl")}
    generation.generate(GenerateConfig(**config, max_new_tokens=60))
    assert main(["audit", str(tmp_path / "a.jsonl"), "--corpus", str(corpus.path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["texts"] == len(SENTENCES) and result["damaged"] == []
    assert result["models"] == [
        {"model": model_checksum(str(run)), "texts": len(SENTENCES), "sentences": result["sentences"]}
    ]
    assert 0 < result["entropy"]["value"] < np.log(K)


def clustered(generator, documents):
    """Documents of ten sentences, nine in ten of which have their document's own action."""
    own = generator.integers(5, size=(documents, 1))
    actions = np.where(generator.random((documents, 10)) < 0.9, own, generator.integers(5, size=(documents, 10)))
    return Sequences(actions.reshape(-1).astype(np.int64), np.full(documents, 10))


def test_one_in_twenty_samples_is_called_a_drift_however_alike_sentences_of_a_text_are():
    generator = np.random.default_rng(0)
    corpus = clustered(generator, 2000)
    how = {"resamples": 200, "seed": 1}
    verdicts = []
    for _ in range(100):
        result = drift(clustered(generator, 20).counts(5), np.zeros(20, np.int64), corpus, [""] * 5, **how)
        verdicts.append(result["total_variation"]["verdict"] == "drift")
    assert 0 <= sum(verdicts) <= 12, "were chance to draw sentences one by one, 88 would be"


def test_distances_are_those_of_the_books():
    generator = np.random.default_rng(0)
    shares, other = generator.dirichlet([0.3] * 9, size=3), generator.dirichlet([0.3] * 9)
    computed = distances(shares, other)
    assert computed[:, 0] == pytest.approx(np.abs(shares - other).sum(axis=1) / 2)
    assert computed[:, 1] == pytest.approx([jensenshannon(one, other, base=2) for one in shares])
    assert distances(np.eye(2)[:1], np.eye(2)[1])[0].tolist() == [1, 1]


def placed(generator, documents):
    """Documents of four to 29 sentences, whose actions go with where they stand."""
    lengths = generator.integers(4, 30, size=documents)
    at = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    noise = generator.random(len(at)) < 0.3
    return Sequences(np.where(noise, generator.integers(5, size=len(at)), np.minimum(at // 2, 4)), lengths)


def test_beginnings_of_documents_are_held_against_beginnings() -> None:
    generator = np.random.default_rng(2)
    corpus, places, verdicts = placed(generator, 2000), np.full(40, 3), []
    for _ in range(60):
        texts = placed(generator, 40)
        rows = [begin + np.arange(3, min(length, 7)) for begin, length in zip(texts.begins, texts.lengths, strict=True)]
        own = Sequences(texts.actions[np.concatenate(rows)], np.array(list(map(len, rows))))
        result = drift(own.counts(5), places, corpus, [""] * 5, resamples=200, seed=1)
        verdicts.append(result["total_variation"]["verdict"] == "drift")
    assert 0 <= sum(verdicts) <= 8, "were samples to begin anywhere, 60 would be"


def test_texts_longer_than_any_document_are_held_against_several() -> None:
    generator = np.random.default_rng(3)
    corpus = Sequences(generator.integers(5, size=8000), np.full(2000, 4))
    places = np.array([9] * 20)
    found = [
        drift(csr_array(generator.multinomial(60, shares, size=20)), places, corpus, [""] * 5, resamples=200, seed=1)
        for shares in ([0.2] * 5, [0.3, *[0.175] * 4])
    ]
    assert [one["total_variation"]["verdict"] for one in found] == ["no more than chance", "drift"]


def test_few_samples_of_the_corpus_call_nothing_a_drift() -> None:
    corpus = Sequences(np.arange(4000) % 4, np.full(400, 10))
    result = drift(csr_array(np.eye(4)[:1] * 50), np.zeros(1, np.int64), corpus, [""] * 4, resamples=1, seed=0)
    assert result["total_variation"]["p"] == 0.5 and result["total_variation"]["verdict"] == "no more than chance"
