"""`kill -9` at random moments, each time `train --resume`: as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

STEPS = 60
KILLS = 4
"""Twenty pass too (dev/log.md), and take four minutes."""


def start(planted: dict[str, str], out: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "planlm", "train", "--corpus", planted["corpus"], "--lm", planted["lm"]]
    settings = {
        "--out": out, "--steps": STEPS, "--batch-size": 4, "--window": 16, "--conditioned-layers": 2,
        "--log-every": 1, "--checkpoint-every": 7, "--selection": "gumbel", "--oracle-mix": "0.5:0",
        "--planner-loss": 0.1, "--lm-mode": "full", "--validate-every": 5, "--validate-documents": 2,
    }  # fmt: skip
    command += [str(part) for pair in settings.items() for part in pair]
    return subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def logged(out: Path) -> list[dict[str, Any]]:
    """Metrics that do not depend on the clock."""
    timed = {"tokens_per_second", "waiting", "memory", "seconds", "seconds_left", "utilisation"}
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def test_a_killed_run_ends_bit_for_bit_as_one_never_killed(planted: dict[str, str], tmp_path: Path) -> None:
    whole = start(planted, tmp_path / "whole")
    began = time.monotonic()
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    took = time.monotonic() - began
    moments = random.Random(0)
    for _ in range(KILLS):
        process = start(
            planted, tmp_path / "cut", *(["--resume"] if (tmp_path / "cut" / "config.yaml").exists() else [])
        )
        time.sleep(moments.uniform(0.3, 1.0) * took)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = start(planted, tmp_path / "cut", *(["--resume"] if (tmp_path / "cut" / "config.yaml").exists() else []))
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
