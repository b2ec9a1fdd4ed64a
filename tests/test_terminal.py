"""The standard streams: closed, full, without a reader, not UTF-8, and fed with what acts on a terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from planlm.terminal import encodable, visible

RESULT = {
    "split": "test", "window": 8, "stride": 8, "tokens": 9, "documents": 2, "versus": "fixed", "planner": None,
    "rows": [
        {"plan": "fixed", "nll": 1.0, "perplexity": 2.7, "delta": 0.0, "ci95": None, "verdict": "reference",
         "tokens": 9, "documents": 2},
        {"plan": "so\x1b[31mft", "nll": 1.0, "perplexity": 2.7, "delta": -0.1, "ci95": [-0.2, -0.1],
         "verdict": "better", "tokens": 9, "documents": 2},
    ],
}  # fmt: skip

# `planlm evaluate` with a stand-in for the evaluation, which takes a minute and is not what is tried here.
STAND_IN = f"""
import sys, types
from planlm import cli
module = sys.modules["stand_in"] = types.ModuleType("stand_in")
def run(settings):
    print("library's own", flush=True)
    print("a message \\x1b]0;title\\x07", file=sys.stderr, flush=True)
    return {RESULT!r}
module.run = run
import dataclasses
cli.COMMANDS["evaluate"] = dataclasses.replace(cli.COMMANDS["evaluate"], run="stand_in:run")
sys.argv = ["planlm", "evaluate", "run", "--corpus", "c", *sys.argv[1:]]
sys.exit(cli.main())
"""


def planlm(redirections: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command above in a shell, with these redirections."""
    command = ["bash", "-c", f'"$@" {redirections}', "bash", sys.executable, "-c", STAND_IN, *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def test_the_result_alone_goes_to_stdout() -> None:
    done = planlm("")
    assert done.returncode == 0 and done.stdout.startswith("Perplexity on the test split")
    assert done.stderr == "library's own\na message \\x1b]0;title\\x07\n"


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", "<&- 2>&-"])
def test_without_stderr_the_result_still_comes(closed: str) -> None:
    done = planlm(closed, "--json")
    assert done.returncode == 0 and json.loads(done.stdout) == RESULT
    assert planlm(closed, "--window", "0").returncode == 2


@pytest.mark.parametrize(
    ("redirection", "reason"), [(">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")]
)
@pytest.mark.parametrize("words", [[], ["--json"], ["--help"]])
def test_a_result_that_cannot_be_shown_is_a_failure_of_one_line(
    redirection: str, reason: str, words: list[str]
) -> None:
    done = planlm(redirection, *words)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"planlm: error: standard output: {reason}; the result could not be shown"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_reader_who_has_gone_is_no_error_to_speak_of() -> None:
    done = planlm("| true; exit ${PIPESTATUS[0]}", "--json")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "error" not in done.stderr


def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    code = "import sys, os\nfrom planlm.terminal import open_streams\nopen_streams()\n"
    code += (
        f"file = open({str(tmp_path / 'model')!r}, 'w')\nos.write(2, b'message')\nprint('message', file=sys.stderr)\n"
    )
    code += "file.write('weights')\nfile.close()"
    subprocess.run(["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", code], check=True)
    assert (tmp_path / "model").read_text() == "weights"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_table_is_shown_in_any_encoding(encoding: str) -> None:
    command = [sys.executable, "-c", STAND_IN]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    assert ("−0.1000" if encoding == "utf-8" else "-0.1000") in done.stdout.decode(encoding)
    help_ = subprocess.run([*command, "--help"], capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert help_.returncode == 0 and b"usage: planlm evaluate" in help_.stdout


def test_an_encoding_without_a_letter_gets_its_number() -> None:
    assert encodable("Łódź – −1", "ascii") == "\\u0141\\xf3d\\u017a - -1"
    assert encodable("Łódź – −1", "utf-8") == "Łódź – −1"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("\x9b2J\x07\x00\x7f", "\\x9b2J\\x07\\x00\\x7f"),
        ("user\u202etxt.exe\u2066", "user\\u202etxt.exe\\u2066"),
        ("covered\rline", "covered\\rline"),
        ("two\r\nlines\tand a tab", "two\r\nlines\tand a tab"),
        ("שלום\u200f 🙂\u200d", "שלום\u200f 🙂\u200d"),
    ],
)
def test_what_acts_on_a_terminal_is_shown_instead(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_results_and_errors_are_made_visible() -> None:
    shown = planlm("").stdout
    assert "so\\x1b[31mft" in shown and "\x1b" not in shown
    assert json.loads(planlm("", "--json").stdout)["rows"][1]["plan"] == "so\x1b[31mft"
    error = planlm("", "--plans", "\x1b[31m").stderr
    assert "\x1b" not in planlm("", "--window", "0", "--split", "\x1b]0;x\x07").stderr + error


def test_a_bar_is_drawn_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    from tqdm import tqdm

    from planlm.terminal import _Errors

    raw = io.BytesIO()
    stream = _Errors(raw, encoding="utf-8")
    for _ in tqdm(range(3), file=stream, mininterval=0):
        pass
    stream.flush()
    assert "\\" not in raw.getvalue().decode() and raw.getvalue().count(b"\r") > 2
