"""A result outlives the files that only keep it: one warning, and never a file out of the run."""

from __future__ import annotations

import errno
import json
import os

import pytest

import planlm.model.generation as generation
from planlm import files
from planlm.config import EvaluateConfig, GenerateConfig
from planlm.errors import InputError
from planlm.evaluation.evaluate import evaluate
from planlm.model.loading import load_model

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def run(make_corpus, make_run, encoder, monkeypatch):
    """A run directory, with a model for `generate` that needs no encoder's weights."""
    run = make_run(make_corpus())
    model = load_model(str(run))
    model.encoder = encoder
    monkeypatch.setattr(generation, "load_model", lambda run: model)
    return run


@pytest.fixture
def outside(tmp_path):
    """What must stay as it is."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("precious")
    yield tmp_path / "outside"
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["file"]
    assert (tmp_path / "outside" / "file").read_text() == "precious"


def do_evaluate(run):
    config = EvaluateConfig(run=str(run), corpus=str(run.parent / "corpus"), plans="none", versus="none")
    return evaluate(config)["rows"][0]["plan"]


def do_generate(run, **options):
    return generation.generate(GenerateConfig(run=str(run), prompt="Rain fell.", max_new_tokens=3, **options))["prompt"]


COMMANDS = [(do_evaluate, "evaluation.json", "none"), (do_generate, "generation.json", "Rain fell.")]


@pytest.mark.parametrize(("command", "file", "result"), COMMANDS)
def test_in_a_read_only_run_the_result_comes_with_a_warning(run, command, file, result, monkeypatch, capsys):
    real = os.open

    def read_only(path, flags, *rest, **named):
        if flags & os.O_CREAT and str(path).startswith(str(run)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", read_only)
    assert command(run) == result
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"planlm: warning: {run / file} could not be written (Read-only file system); the result is complete"
    assert sorted(path.name for path in run.iterdir()) == ["model"]


@pytest.mark.parametrize(("command", "file", "result"), COMMANDS)
def test_on_a_full_disk_the_result_comes_with_a_warning(run, command, file, result, monkeypatch, capsys):
    (run / file).write_text("{}")

    def full(descriptor):
        raise FULL

    monkeypatch.setattr(os, "fsync", full)
    assert command(run) == result
    assert f"{run / file} could not be written (No space left on device)" in capsys.readouterr().err
    assert (run / file).read_text() == "{}"
    assert sorted(path.name for path in run.iterdir()) == [file, "model"]


@pytest.mark.parametrize(("command", "file", "result"), COMMANDS)
@pytest.mark.parametrize("beside", ["", ".partial"])
def test_a_link_out_of_the_run_is_not_followed(run, outside, command, file, result, beside, capsys):
    for target in ("absent", "file"):
        (run / (file + beside)).unlink(missing_ok=True)
        (run / (file + beside)).symlink_to(outside / target)
        if command is do_evaluate and target == "file" and not beside:  # what is there is read first
            with pytest.raises(InputError, match="not valid JSON"):
                command(run)
            continue
        assert command(run) == result
        assert (f"{run / file} could not be written" in capsys.readouterr().err) == (not beside)
        assert (run / (file + beside)).is_symlink()


def test_a_run_named_by_a_link_gets_its_files(run):
    link = run.parent / "latest"
    link.symlink_to(run.name)
    for command, file, _ in COMMANDS:
        command(link)
        json.loads((run / file).read_text())
    assert link.is_symlink()


def test_an_audit_that_cannot_be_written_costs_no_text(run, tmp_path, capsys):
    with pytest.raises(InputError, match=r"--audit .*: no such folder"):
        do_generate(run, audit=str(tmp_path / "absent" / "audit.jsonl"))
    assert do_generate(run, audit=str(tmp_path)) == "Rain fell."
    assert f"{tmp_path} could not be written (Is a directory)" in capsys.readouterr().err
    assert do_generate(run, audit="/dev/full") == "Rain fell."
    assert "/dev/full could not be written (No space left on device)" in capsys.readouterr().err


def test_an_audit_follows_the_users_link(run, tmp_path):
    (tmp_path / "link").symlink_to("audit.jsonl")
    do_generate(run, audit=str(tmp_path / "link"))
    do_generate(run, audit=str(tmp_path / "link"), seed=1)
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert len({line["text"] for line in lines}) == 2 and (tmp_path / "link").is_symlink()


def test_what_is_no_failure_of_writing_is_not_hidden():
    with pytest.raises(ZeroDivisionError), files.beside_result("x"):
        raise ZeroDivisionError
