"""What the command line shows of warnings: PlanLM's own and those about weights, and no other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TALK = """
import logging, warnings
from planlm.terminal import silence_libraries
silence_libraries()
silence_libraries()
import datasets, huggingface_hub, torch, transformers
from transformers.modeling_utils import logger
names = "planlm.kernels matplotlib datasets.x huggingface_hub.x transformers.x torch.x torch._dynamo some"
for name in names.split():
    logging.getLogger(name).warning("%s warns", name)
    logging.getLogger(name).error("%s fails", name)
warnings.warn("of Python")
logger.warning("GPT2 LOAD REPORT: MISSING")
logger.warning("chatter")
"""


def talk(**variables: str) -> list[str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.endswith("VERBOSITY") and name != "TORCH_LOGS"
    }
    done = subprocess.run(
        [sys.executable, "-c", TALK], env=kept | variables, capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()


def test_libraries_are_silent_and_planlm_is_not() -> None:
    lines = talk()
    said = [
        line for line in lines if "warns" in line or "chatter" in line or "of Python" in line or "LOAD REPORT" in line
    ]
    assert [line.rpartition("] ")[2] for line in said] == ["planlm.kernels warns", "GPT2 LOAD REPORT: MISSING"]
    assert sum("fails" in line for line in lines) == 8, lines


def test_one_of_several_processes_speaks() -> None:
    assert not [line for line in talk(RANK="1", WORLD_SIZE="2") if "planlm.kernels warns" in line]


def test_verbose_shows_everything() -> None:
    assert sum("warns" in line for line in talk(PLANLM_VERBOSE="1")) == 8


OPERATE = """
from planlm.terminal import silence_libraries
silence_libraries()
import torch
from planlm.kernels import plan_projection
for _ in range(2):
    plan_projection(torch.zeros(2, 4), torch.zeros(4, 3), torch.zeros(5, 3), None)
"""


@pytest.mark.parametrize("program", [["-m", "planlm", "doctor"], ["-c", OPERATE]], ids=["doctor", "operation"])
def test_a_fall_back_reaches_the_terminal_once(program: list[str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PLANLM_VERBOSE"}
    done = subprocess.run(
        [sys.executable, *program],
        env=environment | {"CXX": "no-such-compiler", "PLANLM_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    line = "planlm.kernels: no C++ compiler (no-such-compiler) for the C++ operators: install g++ or set CXX"
    assert done.stderr.count(f"{line}; the eager reference runs instead\n") == 1, done.stderr
    assert done.returncode == 0
    if "doctor" in program:
        assert done.stdout.count("no C++ compiler (no-such-compiler)") == 1
        assert "C++ compiler       none found" in done.stdout
