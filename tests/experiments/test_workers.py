"""Processes of cells: alone, with their share of the cores or a GPU each, and gone with whoever started them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from planlm.experiments import workers
from planlm.experiments.cell import BUSY
from planlm.experiments.workers import Workers
from planlm.files import locked

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x",
            "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "1", "GROUP_RANK": "0"}  # fmt: skip


def test_cells_share_the_cores_and_fewer_threads_stay_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Workers(tmp_path, 2)._environment(0, "train")["OMP_NUM_THREADS"] == "4"
    assert Workers(tmp_path, 2)._environment(0, "corpus")["OMP_NUM_THREADS"] == "8"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Workers(tmp_path, 2)._environment(0, "train")["OMP_NUM_THREADS"] == "3"
    assert Workers(tmp_path, 20)._environment(0, "train")["OMP_NUM_THREADS"] == "1"


def test_a_rank_has_one_cell_and_that_one_knows_nothing_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_cores", lambda: 8)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    found = Workers(tmp_path, None)
    assert found.jobs == 1
    environment = found._environment(0, "train")
    assert not environment.keys() & TORCHRUN.keys() and environment["OMP_NUM_THREADS"] == "4"


def test_each_cell_has_a_gpu_of_those_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_devices", lambda: ["2", "5"])
    found = Workers(tmp_path, None)
    assert found.jobs == 2
    assert [found._environment(slot, "train")["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["2", "5"]


def start(out: Path) -> subprocess.Popen[str]:
    """A cell's process, told of a task that ends at once."""
    (out / "cells").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "planlm.experiments.cell", str(out)], stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    task = {"key": "k", "kind": "tokens", "name": "n", "folder": "runs/f", "settings": {"corpus": str(out), "lm": "x"}}
    assert process.stdin is not None
    process.stdin.write(json.dumps([task | {"needs": []}]) + "\n")
    process.stdin.flush()
    return process


def test_a_task_that_another_process_works_on_is_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    with locked(tmp_path / "cells" / "f.lock"):
        assert start(tmp_path).wait(60) == BUSY
    failing = start(tmp_path)
    assert failing.wait(60) == 2 and failing.stderr is not None
    assert f"error: {tmp_path}: no prepared corpus" in failing.stderr.read()


def test_a_cell_ends_with_whoever_started_it(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; sys.argv = ['cell', '.']\n"
         "from planlm.experiments import cell\ncell._do = lambda out, task: time.sleep(100)\n"
         f"from pathlib import Path\nsys.exit(cell.main(Path({str(tmp_path)!r})))"], stdin=subprocess.PIPE, text=True,
    )  # fmt: skip
    (tmp_path / "cells").mkdir()
    assert process.stdin is not None
    process.stdin.write('[{"key": "k", "folder": "f"}]\n')
    process.stdin.flush()
    while not (tmp_path / "cells" / "f.lock").exists():
        assert process.poll() is None
    process.stdin.close()
    assert process.wait(60) == 1
