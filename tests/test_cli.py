"""The command line: settings from flags and files, one line and a status for every failure, JSON on stdout alone."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planlm import arguments, cli, config
from planlm.errors import InputError, MachineError

ROOT = Path(__file__).parents[1]
TRAIN = ["--corpus", "c", "--out", "r"]


def parse(command: str, *words: str) -> Any:
    return arguments.parse(cli.COMMANDS[command].config, list(words), prog=f"planlm {command}", epilog="")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `planlm report` with a stand-in for its implementation, which only the test decides."""

    def start(implementation: Any, *words: str) -> int:
        module = types.ModuleType("stand_in")
        module.implementation = implementation  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "stand_in", module)
        command = cli.Command(config.ReportConfig, "stand_in:implementation", lambda result, settings: str(result), "")
        monkeypatch.setitem(cli.COMMANDS, "report", command)
        return cli.main(["report", "run", *words])

    return start


def failing(error: BaseException) -> Any:
    def implementation(settings: config.ReportConfig) -> None:
        raise error

    return implementation


# Settings


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_names_every_setting_with_its_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    for field in dataclasses.fields(cli.COMMANDS[name].config):
        flag = field.name.upper().rstrip("S") if field.metadata["positional"] else "--" + field.name.replace("_", "-")
        assert flag in shown
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"(default: {field.default})" in words
    assert cli.COMMANDS[name].example in shown


def test_top_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_implementations_exist(name: str) -> None:
    module, function = cli.COMMANDS[name].run.split(":")
    path = ROOT / (module.replace(".", "/") + ".py")
    assert f"def {function}(" in path.read_text()


def test_flags_have_the_types_of_the_fields() -> None:
    settings = parse("train", *TRAIN, "--lr", "1e-2", "--steps", "7", "--gate", "--no-json", "--top-k", "3")
    assert (settings.lr, settings.steps, settings.gate, settings.json, settings.top_k) == (0.01, 7, True, False, 3)
    assert settings == config.TrainConfig(corpus="c", out="r", lr=0.01, steps=7, gate=True, top_k=3)


def test_positionals_can_stand_between_flags() -> None:
    assert parse("prepare", "a", "--out", "c", "b").inputs == ("a", "b")


def test_flags_win_over_the_file_which_wins_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("corpus: c\nout: r\nlr: 1e-2\nbatch-size: 4\nsteps: null\noracle_mix: 0.5\ngate: true\n")
    settings = parse("train", "--config", str(file), "--batch-size", "8")
    assert settings == config.TrainConfig(
        corpus="c", out="r", lr=0.01, batch_size=8, steps=None, oracle_mix="0.5", gate=True
    )


def test_a_file_can_give_positionals(tmp_path: Path) -> None:
    file = tmp_path / "prepare.yaml"
    file.write_text("inputs: [a.txt, b.txt]\nout: c\n")
    assert parse("prepare", "--config", str(file)).inputs == ("a.txt", "b.txt")


def test_a_resolved_configuration_can_be_read_again(tmp_path: Path) -> None:
    import dataclasses

    import yaml

    settings = config.TrainConfig(corpus="c", out="r", lr=3e-5, oracle_mix="0.5:0")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(settings)))
    assert parse("train", "--config", str(file)) == settings


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning-rate: 1", "unknown setting 'learning-rate'"),
        ("batchsize: 1", "did you mean batch_size?"),
        ("batch_size: many", "batch_size: expected a whole number, got 'many'"),
        ("batch_size: 2.5", "batch_size: expected a whole number, got 2.5"),
        ("batch_size: null", "batch_size: expected a whole number, got None"),
        ("gate: 1", "gate: expected true or false, got 1"),
        ("lr: [1]", "lr: expected a number, got [1]"),
        ("selection: true", "selection: expected a text, got True"),
        ("lr: 1\n  x: 2", ":2: not YAML"),
        ("- lr", "expected lines of the form"),
    ],
)
def test_a_wrong_file_is_named_with_its_fault(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        parse("train", *TRAIN, "--config", str(file))
    assert str(file) in str(caught.value)
    assert says in str(caught.value)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"lr: \xe9")
    for name in ("absent", "latin", "."):
        with pytest.raises(InputError, match="expected a YAML file of settings"):
            parse("train", *TRAIN, "--config", str(tmp_path / name))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train"], "missing --corpus CORPUS, --out OUT"),
        (["prepare", "--out", "c"], "missing INPUT..."),
        (["train", *TRAIN, "--batchsize", "3"], "unknown option --batchsize; did you mean --batch-size?"),
        (["train", *TRAIN, "extra"], "unexpected argument 'extra'"),
        (["train", *TRAIN, "--lr", "fast"], "--lr"),
        (["train", *TRAIN, "--lr"], "--lr"),
        (["train", *TRAIN, "--selection", "sharp"], "--selection"),
        (["train", *TRAIN, "--batch-size", "0", "--lr", "nan"], "--batch-size 0: expected at least 1; --lr nan"),
        (["prepare", "a", "--out", "c", "--test-fraction", "1"], "--test-fraction 1.0: expected at least 0 and less"),
        (["tran"], "tran"),
        (["--nonsense"], "COMMAND"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("planlm: error: ")
    assert says in printed.err


def test_library_calls_are_checked_as_flags_are() -> None:
    with pytest.raises(InputError, match="--selection sharp: expected one of soft, hard"):
        config.TrainConfig(corpus="c", out="r", selection="sharp")


# Failures


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (InputError("rows.jsonl:3:\n  no field"), 2, "rows.jsonl:3: no field"),
        (MachineError("no device"), 1, "no device"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone.txt"), 2, "gone.txt: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "theirs"), 2, "theirs: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device", "big.arrow"), 1, "no space left on the disk for big.arrow"),
        (RuntimeError("safetensors: No space left on device (os error 28)"), 1, "no space left on the disk"),
        (OSError(errno.EIO, "Input/output error", "disk"), 1, "disk: Input/output error"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (KeyboardInterrupt("stopped after step 3; continue with --resume"), 1, "continue with --resume"),
    ],
)
def test_every_failure_is_one_line_and_a_status(
    run: Any, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, says: str
) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        assert run(failing(error)) == status
    finally:
        signal.signal(signal.SIGINT, before)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("planlm: error: ")
    assert says in printed.err


def test_a_full_disk_is_found_behind_other_errors(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def implementation(settings: config.ReportConfig) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("could not write the shard") from error

    assert run(implementation) == 1
    assert "no space left" in capsys.readouterr().err


def test_ended_while_it_unwinds_it_says_who_was_lost(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """torchrun may send its SIGTERM before the error of a collective has reached the top."""

    def implementation(settings: config.ReportConfig) -> None:
        try:
            raise torch.distributed.DistNetworkError("Connection reset by peer")
        finally:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGINT)
    try:
        assert run(implementation) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "planlm: error: another process of this run has ended\n"


def test_a_bug_keeps_its_traceback(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        run(failing(ZeroDivisionError()))
    assert "please report it" in capsys.readouterr().err


SLEEPER = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
from planlm import cli
module = types.ModuleType("sleeper")
def implementation(settings):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
module.implementation = implementation
sys.modules["sleeper"] = module
cli.COMMANDS["doctor"] = cli.Command(cli.config.DoctorConfig, "sleeper:implementation", lambda result, settings: "", "")
sys.exit(cli.main(["doctor"]))
"""


@pytest.mark.parametrize(
    ("number", "says"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "terminated")]
)
def test_signals_end_in_one_line(number: signal.Signals, says: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err == f"planlm: error: {says}\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    code = """
import sys, types
from planlm import cli
module = types.ModuleType("chatty")
module.implementation = lambda settings: "line\\n" * 100_000
sys.modules["chatty"] = module
cli.COMMANDS["doctor"] = cli.Command(cli.config.DoctorConfig, "chatty:implementation", lambda text, settings: text, "")
sys.exit(cli.main(["doctor"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=30)


# Results


def test_json_is_all_there_is_on_stdout(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def implementation(settings: config.ReportConfig) -> dict[str, Any]:
        print("a library's chatter")
        return {
            "path": Path("a"),
            "nan": float("nan"),
            "numbers": [np.float32(0.5), np.int64(3), torch.tensor([1, 2])],
            "nested": {"settings": config.DoctorConfig(), 7: (1, None)},
        }

    assert run(implementation, "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "path": "a",
        "nan": None,
        "numbers": [0.5, 3, [1, 2]],
        "nested": {"settings": {"json": False}, "7": [1, None]},
    }
    assert "chatter" in printed.err


def test_without_json_the_result_is_text(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda settings: settings.runs) == 0
    assert capsys.readouterr().out == "('run',)\n"


def test_doctor_reports_every_section() -> None:
    environment = os.environ | {"PLANLM_VERBOSE": "1"}
    command = [sys.executable, "-m", "planlm", "doctor"]
    printed = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True, env=environment)
    found = json.loads(printed.stdout)
    assert list(found) == ["software", "processor", "cuda", "operators", "quickstart", "environment"]
    assert found["software"]["torch"] == torch.__version__
    assert found["operators"]["backend reference"] == "runs on cpu" or torch.cuda.is_available()
    assert found["environment"]["PLANLM_VERBOSE"] == "1"
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert all(f"\n{section}\n" in f"\n{text}" for section in found)
