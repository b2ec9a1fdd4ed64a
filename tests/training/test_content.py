"""What `--resume` goes on with: the same corpus, LM and planner by content, wherever they lie; and nothing unsound."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import planlm.corpus.shards as shards
from planlm.config import PlannerConfig, PrepareConfig, TrainConfig
from planlm.corpus.prepare import prepare
from planlm.corpus.store import PreparedCorpus, write_manifest
from planlm.errors import InputError, MachineError
from planlm.files import locked
from planlm.training import identity
from planlm.training.checkpoint import _digest
from planlm.training.objective import Objective
from planlm.training.pretrain_planner import pretrain_planner
from planlm.training.train import train
from tests.training.conftest import TypeEncoder, planted_text


@pytest.fixture(scope="module")
def parts(planted: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `corpus`, `lm` and `planner`, and beside each one of other content: `corpus2` and so on."""
    folder = tmp_path_factory.mktemp("parts")
    for name in ("corpus", "lm"):
        shutil.copytree(planted[name], folder / name)
    (folder / "texts").mkdir()
    for document in range(100, 160):
        (folder / "texts" / f"{document}.txt").write_text(planted_text(document))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SentenceEncoder", TypeEncoder)
        prepare(
            PrepareConfig(
                inputs=(str(folder / "texts"),), out=str(folder / "corpus2"), tokenizer=str(folder / "lm"), actions=4,
                encoder="types", validation_fraction=0.1, test_fraction=0.1,
            )
        )  # fmt: skip
    # The same actions, so that nothing but the documents tells.
    manifest = PreparedCorpus.load(folder / "corpus2").manifest
    shutil.copy(folder / "corpus" / "codebook.safetensors", folder / "corpus2")
    write_manifest(folder / "corpus2", manifest)
    lm = AutoModelForCausalLM.from_pretrained(folder / "lm")
    shutil.copytree(folder / "lm", folder / "lm2")
    with torch.no_grad():
        lm.get_input_embeddings().weight[5, 3] += 0.01
    lm.save_pretrained(folder / "lm2")
    for name, seed in (("planner", 0), ("planner2", 1)):
        config = PlannerConfig(corpus=str(folder / "corpus"), out=str(folder / name), steps=2, batch_size=4, heads=4)
        pretrain_planner(replace(config, seed=seed))
    return folder


def settings(parts: Path, out: Path, **changes: Any) -> TrainConfig:
    values = {
        "corpus": str(parts / "corpus"), "lm": str(parts / "lm"), "planner": str(parts / "planner"), "out": str(out),
        "steps": 4, "batch_size": 4, "window": 16, "conditioned_layers": 2, "precision": "fp32", "log_every": 1,
        "checkpoint_every": 2,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def cut(out: Path) -> None:
    """As if the run had been stopped after step 2."""
    shutil.rmtree(out / "checkpoints" / "step-4")
    shutil.rmtree(out / "model", ignore_errors=True)


def swapped(parts: Path, where: Path, name: str) -> Path:
    """The parts once more, of which `name` has another's content under its own name."""
    shutil.copytree(parts, where)
    shutil.rmtree(where / name)
    (where / f"{name}2").rename(where / name)
    return where


@pytest.mark.parametrize("name", ["corpus", "lm", "planner"])
def test_other_content_at_the_same_path_is_refused(name: str, parts: Path, tmp_path: Path) -> None:
    here = tmp_path / "parts"
    shutil.copytree(parts, here)
    train(settings(here, tmp_path / "run"))
    cut(tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    shutil.rmtree(here)
    swapped(parts, here, name)
    with pytest.raises(InputError, match=rf"run: cannot resume with other content.*\({name} .*parts/{name}, now") as e:
        train(settings(here, tmp_path / "run", resume=True))
    assert "\n" not in str(e.value)
    assert {file: file.read_bytes() for file in before if file.name != "lock"} == {
        file: content for file, content in before.items() if file.name != "lock"
    }


def test_the_same_content_elsewhere_is_accepted(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(settings(parts, tmp_path / "whole"))
    monkeypatch.chdir(parts)
    config = settings(parts, tmp_path / "run", corpus="corpus", lm="lm", planner="planner")
    train(config)
    cut(tmp_path / "run")
    shutil.copytree(parts, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    train(
        replace(config, corpus="moved/corpus/", lm="./moved/lm", planner=str(tmp_path / "moved/planner"), resume=True)
    )
    whole, again = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_planner_goes_on_with_its_corpus_only(parts: Path, tmp_path: Path) -> None:
    config = PlannerConfig(
        corpus=str(parts / "corpus"), out=str(tmp_path / "run"), steps=4, batch_size=4, checkpoint_every=2, heads=4
    )
    pretrain_planner(config)
    cut(tmp_path / "run")
    with pytest.raises(InputError, match=r"cannot resume with other content.*\(corpus .*corpus2, now another"):
        pretrain_planner(replace(config, corpus=str(parts / "corpus2"), resume=True))
    shutil.copytree(parts / "corpus", tmp_path / "c")
    pretrain_planner(replace(config, corpus=str(tmp_path / "c"), resume=True))


def test_checkpoints_of_another_run_are_refused(parts: Path, tmp_path: Path) -> None:
    train(settings(parts, tmp_path / "run"))
    train(settings(parts, tmp_path / "other", lm=str(parts / "lm2")))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(InputError, match=r"step-4: checkpoint of a run with another lm; give that"):
        train(settings(parts, tmp_path / "run", resume=True))


def test_an_lm_is_what_it_computes(parts: Path) -> None:
    """Not the file's layout, its name or the version that wrote it; but every weight and setting."""
    lm = AutoModelForCausalLM.from_pretrained(parts / "lm", dtype=torch.float32)
    corpus = PreparedCorpus.load(parts / "corpus")
    found = identity.identify(corpus, lm)
    lm.config._name_or_path = "elsewhere"
    assert identity.identify(corpus, lm) == found and found["planner"] == "untrained"
    lm.config.activation_function = "relu"
    assert identity.identify(corpus, lm)["lm"] != found["lm"]


# Checkpoints


def test_a_stray_file_in_a_checkpoint_changes_nothing(parts: Path, tmp_path: Path) -> None:
    train(settings(parts, tmp_path / "run"))
    whole = load_file(tmp_path / "run" / "model" / "model.safetensors")
    cut(tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "step-2"
    stray = {name: tensor + 1 for name, tensor in load_file(step / "tensors.safetensors").items()}
    for name in ("a.safetensors", "zz.safetensors"):
        save_file(stray | {"model/foreign": torch.ones(2)}, step / name)
    train(settings(parts, tmp_path / "run", resume=True))
    again = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_without_a_sound_checkpoint_does_not_begin_anew_by_itself(parts: Path, tmp_path: Path) -> None:
    train(settings(parts, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "model")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    for step in (2, 4):
        with (tmp_path / "run" / "checkpoints" / f"step-{step}" / "tensors.safetensors").open("r+b") as file:
            file.write(b"\xff" * 8)
    for _ in range(2):  # what was set aside stays known
        with pytest.raises(MachineError, match=r"no sound checkpoint is left \(step-2.damaged, step-4.damaged\)"):
            train(settings(parts, tmp_path / "run", resume=True))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics
    assert not (tmp_path / "run" / "model").exists()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train(settings(parts, tmp_path / "run", resume=True))
    assert (tmp_path / "run" / "model").exists()


def test_a_checkpoint_of_another_format_is_refused(parts: Path, tmp_path: Path) -> None:
    train(settings(parts, tmp_path / "run"))
    step = tmp_path / "run" / "checkpoints" / "step-4"
    state, sums = (json.loads((step / name).read_text()) for name in ("state.json", "checksums.json"))
    (step / "state.json").write_text(json.dumps(state | {"format_version": 1}))
    (step / "checksums.json").write_text(json.dumps(sums | {"state.json": _digest(step / "state.json")}))
    with pytest.raises(InputError, match=r"step-4: of another PlanLM, format 1"):
        train(settings(parts, tmp_path / "run", resume=True))


# Divergence


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_diverged_run_fails_and_saves_nothing(steps: int, parts: Path, tmp_path: Path) -> None:
    config = settings(parts, tmp_path / "run", lr=1e308, steps=steps, checkpoint_every=1)
    for resume in (False, True):
        with pytest.raises(MachineError, match=r"training has diverged: start again with a lower --lr"):
            train(replace(config, resume=resume))
        assert not (tmp_path / "run" / "model").exists()
        assert not list((tmp_path / "run" / "checkpoints").glob("step-*[0-9]"))


def test_a_diverged_planner_fails_and_saves_nothing(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"training has diverged"):
        pretrain_planner(
            PlannerConfig(corpus=str(parts / "corpus"), out=str(tmp_path / "run"), steps=8, batch_size=4, lr=1e308)
        )
    assert not (tmp_path / "run" / "planner").exists()


def test_a_run_whose_last_step_was_skipped_is_not_done(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Objective.backward

    def lost(self: Objective, step: int, batches: list[Any]) -> dict[str, float]:
        figures = backward(self, step, batches)
        return figures | {"loss": float("nan")} if step == 3 else figures

    monkeypatch.setattr(Objective, "backward", lost)
    for resume in (False, True):
        with pytest.raises(MachineError, match=r"step 4: 1 steps in a row skipped"):
            train(settings(parts, tmp_path / "run", resume=resume))
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    train(settings(parts, tmp_path / "run", resume=True))  # the checkpoint before is sound


# Run directories


def test_a_live_run_is_left_alone(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, before anything is loaded."""
    config = settings(parts, tmp_path / "run")
    train(config)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    monkeypatch.setattr(PreparedCorpus, "load", lambda _: pytest.fail("loaded"))
    with locked(tmp_path / "run" / "lock"):
        for resume in (False, True):
            with pytest.raises(InputError, match=rf"run: process {os.getpid()} on \S+ is at work on this run; wait"):
                train(replace(config, resume=resume))
    with pytest.raises(InputError, match=r"holds a run already; continue it with --resume"):
        train(config)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_run_is_free_when_its_call_has_ended(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ended it, and though the error keeps all of its variables."""
    monkeypatch.setattr(Objective, "backward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:
        train(settings(parts, tmp_path / "run"))
    monkeypatch.undo()
    train(settings(parts, tmp_path / "run", resume=True))
    assert kept.value


def test_a_planted_link_leads_nowhere(parts: Path, tmp_path: Path) -> None:
    config = settings(parts, tmp_path / "run")
    train(config)
    (tmp_path / "mine").write_text("mine")
    for name in ("lock", "metrics.jsonl", "config.yaml"):
        file = tmp_path / "run" / name
        content = file.read_bytes()
        file.unlink()
        (tmp_path / "mine").write_bytes(content)
        file.symlink_to(tmp_path / "mine")
        with pytest.raises(InputError, match=rf"{name}: a link"):
            train(replace(config, resume=True))
        assert (tmp_path / "mine").read_bytes() == content and file.is_symlink()
        file.unlink()
        file.write_bytes(content)


def test_what_cannot_be_written_is_found_first(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(PreparedCorpus, "load", lambda _: pytest.fail("loaded"))
    for out in ("file", "file/run"):
        with pytest.raises(InputError, match=r"file: not a folder; choose another --out"):
            train(settings(parts, tmp_path / out))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=rf"{tmp_path}: cannot be written; choose another --out"):
        train(settings(parts, tmp_path / "new" / "run"))
    assert not (tmp_path / "new").exists()


def test_a_disk_without_room_for_a_checkpoint_is_found_first(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(Objective, "backward", lambda *_: pytest.fail("trained"))
    with pytest.raises(MachineError, match=r"run: no space left on the disk for a checkpoint: 0.0 GB needed"):
        train(settings(parts, tmp_path / "run"))


def test_lines_that_are_no_steps_are_no_obstacle(parts: Path, tmp_path: Path) -> None:
    train(settings(parts, tmp_path / "run"))
    cut(tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    strange = ["[1, 2]", '{"loss": 1}', '{"step": "3"}', '{"step": null}', '{"step": true}', "7", "[" * 100_000, ""]
    metrics.write_text("\n".join([lines[0], *strange, lines[1], *strange]) + "\n")
    result = train(settings(parts, tmp_path / "run", resume=True))
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4]
    assert result["step"] == 4
    with metrics.open("a") as file:
        file.write("\n".join(strange))
    assert train(settings(parts, tmp_path / "run", resume=True))["step"] == 4


def test_settings_of_a_run_that_nobody_could_have_written_are_damage(parts: Path, tmp_path: Path) -> None:
    config = settings(parts, tmp_path / "run")
    train(config)
    bomb = "a: &a [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else '*a'] * 9)}]\n" for n in range(9))
    for text in (bomb, "lr: {x: 1}\n", "lr: many\n", "[1]", "[" * 9000, "corpus: a\ncorpus: b\n", "other: 1\n"):
        (tmp_path / "run" / "config.yaml").write_text(text)
        with pytest.raises(InputError, match=r"config.yaml: damaged; choose another --out, or delete the run"):
            train(replace(config, resume=True))


def test_an_encoder_that_is_gone_is_missed_at_once(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = PreparedCorpus.load(parts / "corpus")
    identity.check_encoder(corpus)
    assert capsys.readouterr().err == ""
    identity.check_encoder(
        SimpleNamespace(manifest=replace(corpus.manifest, encoder=str(tmp_path / "gone")))  # type: ignore[arg-type]
    )
    assert "gone: the corpus' sentence encoder is not there; `planlm generate` will need it" in capsys.readouterr().err


def test_training_works_in_a_thread(parts: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(train, settings(parts, tmp_path / "run", steps=1)).result()
    assert result["step"] == 1
