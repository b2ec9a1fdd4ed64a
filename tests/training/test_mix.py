"""Training on several corpora: shares, repeatability, what a run remembers of them, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from planlm.config import PrepareConfig, TrainConfig
from planlm.corpus import shards
from planlm.corpus.prepare import prepare
from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError
from planlm.training.corpora import parse_mix
from planlm.training.measured import measure
from planlm.training.train import build, train

from . import small
from .conftest import TypeEncoder, planted_text

Prepare = Callable[..., str]


def settings(planted: dict[str, str], out: Path, *mix: str, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {"steps": 6, "checkpoint_every": 3, "mix": mix or None}
    return small.settings(planted, out, **usual | changes)


@pytest.fixture(autouse=True)
def _no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planlm.training.train.matrix_product_rate", lambda *_: 1e9)


@pytest.fixture(scope="module")
def prepared(planted: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    """Prepares a corpus of other documents than the planted one's."""

    def make(first: int, **options: Any) -> str:
        folder = tmp_path_factory.mktemp("other")
        (folder / "texts").mkdir()
        for document in range(20):
            (folder / "texts" / f"{document:03}.txt").write_text(planted_text(first + document))
        usual = {"tokenizer": planted["lm"], "encoder": "types", "codebook": planted["corpus"]} | options
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "SentenceEncoder", TypeEncoder)
            prepare(PrepareConfig(inputs=(str(folder / "texts"),), out=str(folder / "corpus"), **usual))
        return str(folder / "corpus")

    return make


@pytest.fixture(scope="module")
def others(prepared: Prepare) -> list[str]:
    return [prepared(1000), prepared(2000)]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]


def test_windows_come_from_all_by_their_shares(planted: dict[str, str], others: list[str], tmp_path: Path) -> None:
    plain = build(settings(planted, tmp_path / "run", steps=None))
    mixed = build(settings(planted, tmp_path / "run", f"{others[0]}=0.3", f"{others[1]}=0.2", steps=None))
    assert mixed.loader.num_items == pytest.approx(2 * plain.loader.num_items, abs=1)
    assert mixed.task.steps == mixed.loader.num_batches == pytest.approx(2 * plain.task.steps, abs=1)
    corpora = [PreparedCorpus.load(path) for path in (planted["corpus"], *others)]
    ends = np.cumsum([len(corpus.split("train")) for corpus in corpora])
    found = np.zeros(3)
    for batch in mixed.loader:
        numbers = batch.documents.max(dim=1).values.numpy()
        found += np.bincount(np.searchsorted(ends, numbers, side="right"), minlength=3)
    np.testing.assert_allclose(found / found.sum(), [0.5, 0.3, 0.2], atol=0.01)


def test_a_run_remembers_them_and_resumes_with_these_alone(
    planted: dict[str, str], others: list[str], tmp_path: Path
) -> None:
    mix = [f"{others[0]}=0.3", f"{others[1]}=0.2"]
    train(settings(planted, tmp_path / "whole", *mix, lm_mode="full", accumulate=2, epochs=9.0))
    fingerprints = [PreparedCorpus.load(path).fingerprint for path in others]
    identity = json.loads((tmp_path / "whole" / "identity.json").read_text())
    assert identity["mix"] == f"0.3 of {fingerprints[0]}, 0.2 of {fingerprints[1]}"
    assert identity["mix"] in (tmp_path / "whole" / "model" / "README.md").read_text()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-6")
    shutil.copytree(others[1], tmp_path / "moved")
    moved = [mix[0], f"{tmp_path / 'moved'}=0.2"]
    train(settings(planted, tmp_path / "cut", *moved, lm_mode="full", accumulate=2, epochs=9.0, resume=True))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    models = [load_file(tmp_path / run / "model/model.safetensors") for run in ("cut", "whole")]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[1])
    for changed in ([mix[0]], [], [mix[1], mix[0]], [mix[0], f"{others[1]}=0.1"]):
        with pytest.raises(InputError, match=r"cannot resume with other content than the run began with \(mix"):
            train(settings(planted, tmp_path / "cut", *changed, lm_mode="full", accumulate=2, epochs=9.0, resume=True))


def test_it_goes_with_what_else_reads_a_corpus(planted: dict[str, str], others: list[str], tmp_path: Path) -> None:
    changes = {"rehearsal": others[1], "lm_mode": "full", "validate_every": 3, "selection": "shuffled"}
    found = train(settings(planted, tmp_path / "run", f"{others[0]}=0.5", **changes))
    assert found["step"] == 6 and found["rehearsal_loss"] > 0
    dry = train(settings(planted, tmp_path / "dry", f"{others[0]}=0.5", steps=None, dry_run=True))
    plain = train(settings(planted, tmp_path / "dry", steps=None, dry_run=True))
    assert dry["steps"] == pytest.approx(2 * plain["steps"], abs=1) and not (tmp_path / "dry").exists()
    found = measure(settings(planted, tmp_path / "measured", f"{others[0]}=0.5", steps=None), 0.1, time.time())
    assert found["work"]["steps"] == dry["steps"], "plan-budget"


def test_several_processes_train_as_one(planted: dict[str, str], others: list[str], tmp_path: Path) -> None:
    for size in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"] if size > 1 else []
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "planlm", "train", "--corpus", planted["corpus"], "--lm", planted["lm"],
             "--out", str(tmp_path / str(size)), "--mix", f"{others[0]}=0.3", "--mix", f"{others[1]}=0.2",
             "--steps", "8", "--batch-size", "5", "--window", "16", "--log-every", "1", "--precision", "fp32",
             "--lm-mode", "full"],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=1e-5)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (["a"], r"^--mix 'a': expected CORPUS=SHARE with a share between 0 and 1, such as news=0.3$"),
        (["=0.3"], "expected CORPUS=SHARE"),
        (["a=1"], "between 0 and 1"),
        (["a=nan"], "between 0 and 1"),
        (["a=0.3", "./a=0.2"], r"^--mix a: given twice"),
        (["a=0.5", "b=0.5"], r"^--mix: shares add up to 1; leave 1% of"),
        (
            ["a=0.7", "b=0.2", "c=0.1"],
            r"^--mix: shares add up to 1; leave 1% of",
        ),  # .9999999999999999 in floating point
        (["a=0.999999"], r"^--mix: shares add up to 0.999999; leave 1% of"),
        (["nowhere=0.3"], r"^nowhere: no prepared corpus"),
    ],
)
def test_mistakes_are_named(mix: list[str], message: str, planted: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train(settings(planted, tmp_path / "run", *mix))
    assert not (tmp_path / "run").exists()


def test_a_name_may_have_equals_signs() -> None:
    assert parse_mix(["a=b/c=0.25"]) == {"a=b/c": 0.25}


def test_corpora_that_do_not_fit_are_refused(
    planted: dict[str, str], prepared: Prepare, of_one_token: str, lm_folder: Callable[[str], str], tmp_path: Path
) -> None:
    own_actions = prepared(1000, codebook=None, actions=4)
    other_tokenizer = prepared(1000, tokenizer=lm_folder("llama"))
    for path, message in (
        (own_actions, r"^--mix .*corpus: has other actions than .*corpus; prepare it again with --codebook"),
        (other_tokenizer, r"^--mix .*corpus: prepared with the tokenizer of .*; prepare it again with --tokenizer"),
        (of_one_token, r"^--mix .*corpus: has other actions"),
        (planted["corpus"], r"^--mix .*corpus: has the same content as another corpus of this run"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            train(settings(planted, tmp_path / "run", f"{path}=0.3"))
        assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()
