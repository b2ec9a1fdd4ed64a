"""Encoders whose weights or tokenizers do not fit are refused, none runs code of its own, and nothing is unpickled."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, modeling_utils

from planlm.errors import InputError
from planlm.pretrained.weights import checked_encoder
from planlm.text.encoder import SentenceEncoder
from tests.conftest import make_tokenizer
from tests.damage import Weights, change, configure, pickle_weights, truncate

DENSE = "2_Dense"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with mean pooling and a dense layer, as sentence-transformers saves it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    body, folder = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("encoder")
    tokenizer = make_tokenizer(start=False)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(body)
    tokenizer.save_pretrained(body)
    modules = [Transformer(str(body)), Pooling(32, pooling_mode="mean"), Dense(32, 16)]
    SentenceTransformer(modules=modules).save(str(folder))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "encoder"))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "wrapped": (lambda at: change(at, lambda w: {f"module.{key}": it for key, it in w.items()}), "prefix 'module.'"),
    "missing": (
        lambda at: change(at, lambda w: {key: it for key, it in w.items() if "1.attention.self.query" not in key}),
        r"2 missing \(encoder.layer.1.attention.self.query.bias",
    ),
    "a layer more": (lambda at: configure(at, num_hidden_layers=1), "16 not of this model"),
    "a layer more, with a prefix": (
        lambda at: (
            change(at, lambda w: {f"bert.{key}": it for key, it in w.items()}),
            configure(at, num_hidden_layers=1),
        ),
        "16 not of this model",
    ),
    "another shape": (lambda at: configure(at, vocab_size=10), r"word_embeddings.weight \(400, 32\) for \(10, 32\)"),
    "a million layers": (lambda at: configure(at, num_hidden_layers=10**6), "1,000,000 layers"),
    "a huge vocabulary": (lambda at: configure(at, vocab_size=10**10), "describes 320,000,0"),
    "nan": (lambda at: change(at, lambda w: {key: it * float("nan") for key, it in w.items()}), "not finite"),
    "whole numbers": (lambda at: change(at, lambda w: {key: it.char() for key, it in w.items()}), "quantised"),
    "pickled": (pickle_weights, "never unpickles"),
    "truncated": (truncate, "damaged"),
    "no weights": (lambda at: (at / "model.safetensors").unlink(), "no model.safetensors"),
    "dense wrapped": (
        lambda at: change(at / DENSE, lambda w: {f"module.{key}": it for key, it in w.items()}),
        "Missing key.*linear.weight",
    ),
    "dense infinite": (
        lambda at: change(at / DENSE, lambda w: {key: it * float("inf") for key, it in w.items()}),
        "not finite",
    ),
    "dense whole numbers": (
        lambda at: change(at / DENSE, lambda w: {key: it.char() for key, it in w.items()}),
        "quantised",
    ),
    "dense pickled": (lambda at: pickle_weights(at / DENSE), "never unpickles"),
    "dense truncated": (lambda at: truncate(at / DENSE), "damaged"),
    "no tokenizer": (
        lambda at: [(at / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        "does not tell words apart",
    ),
    "modules of another shape": (lambda at: (at / "modules.json").write_text("5"), "not iterable"),
    "a length that is none": (
        lambda at: configure(at, "sentence_bert_config.json", max_seq_length="x"),
        "not supported between",
    ),
    "an adapter": (lambda at: (at / "adapter_config.json").write_text("{}"), "merge_and_unload"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_encoder_that_does_not_fit_is_refused_in_one_line(folder: Path, damage: str) -> None:
    harm, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(InputError, match=message) as caught:
        SentenceEncoder(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


WHOLE: dict[str, Callable[[Weights], Weights]] = {
    "as saved": lambda w: w,
    "no pooler, which mean pooling does not ask": lambda w: {key: it for key, it in w.items() if "pooler" not in key},
    "heads of pre-training": lambda w: {
        **{f"bert.{key}": it for key, it in w.items()},
        "cls.predictions.bias": torch.ones(400),
    },
    "constants of older versions": lambda w: w | {"embeddings.position_ids": torch.arange(512)[None]},
}


@pytest.mark.parametrize("kind", WHOLE)
def test_what_the_embedding_does_not_need_may_be_missing_or_more(made: Path, folder: Path, kind: str) -> None:
    change(folder, WHOLE[kind])
    texts = ["The cat sat.", "It was warm."]
    expected = SentenceEncoder(str(made), precision="fp32").encode(texts)
    np.testing.assert_array_equal(SentenceEncoder(str(folder), precision="fp32").encode(texts), expected)


def test_a_pooler_that_makes_the_embedding_must_not_be_missing(folder: Path) -> None:
    change(folder, WHOLE["no pooler, which mean pooling does not ask"])
    output = {"text": {"method": "forward", "method_output_name": "pooler_output"}}
    configure(folder, "sentence_bert_config.json", modality_config=output)
    with pytest.raises(InputError, match=r"2 missing \(pooler.dense.bias"):
        SentenceEncoder(str(folder))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("modules.json", "type", "evil.Evil"),
        ("modules.json", "type", "sentence_transformers.base.model.pickle"),
        ("config.json", "auto_map", {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}),
        (f"{DENSE}/config.json", "activation_function", "evil.Evil"),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_an_encoder_runs_no_code_of_its_own(
    folder: Path, file: str, key: str, value: object, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = folder / "ran"
    code = f"open({str(marker)!r}, 'w')\nclass Evil: pass\n"
    for place in (folder, folder / DENSE):
        (place / "evil.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda question="": "yes")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    content = json.loads((folder / file).read_text())
    (content[0] if isinstance(content, list) else content)[key] = value
    (folder / file).write_text(json.dumps(content))
    if not known:
        configure(folder, model_type="of-its-own")
    with contextlib.suppress(InputError):
        SentenceEncoder(str(folder)).encode(["The cat sat."])
    assert not marker.exists()


def test_encoders_loaded_at_the_same_time_leave_transformers_as_it_was() -> None:
    before = modeling_utils.log_state_dict_report, torch.load
    first_is_in, second_is_in = threading.Event(), threading.Event()

    def load_first() -> None:
        with checked_encoder("first", None):
            first_is_in.set()
            second_is_in.wait(0.2)

    first = threading.Thread(target=load_first)
    first.start()
    first_is_in.wait()
    with checked_encoder("second", None):
        second_is_in.set()
        first.join()
    assert (modeling_utils.log_state_dict_report, torch.load) == before
