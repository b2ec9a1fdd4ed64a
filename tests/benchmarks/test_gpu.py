"""The first hour on a GPU, on a CPU that stands in for one: every stage measures, and the page shows it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config

from benchmarks import gpu, gpu_page, gpu_path, gpu_stages, harness, step
from benchmarks.block import SHAPES, Shape
from planlm.errors import MachineError

TINY = GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=96, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)


@pytest.fixture
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA alone has does nothing."""
    monkeypatch.setattr(gpu_stages, "cuda", lambda: torch.device("cpu"))
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_reserved", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 7_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a device")
    monkeypatch.setattr(gpu_stages, "graph_of", lambda run: run)
    kernels = [{"name": "a kernel", "launches": 3, "seconds": 2e-6}]
    monkeypatch.setattr(gpu_stages, "kernels_of", lambda run, most=None: run() and kernels)


@pytest.mark.usefixtures("_cpu")
def test_blocks_and_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", Shape("tiny", 9, 11, 8, 2, 6, 40))
    monkeypatch.setattr(gpu_stages.importlib.util, "find_spec", lambda name: None)  # Liger needs the device
    monkeypatch.setattr(gpu_stages, "LOSS_ROWS", 4)
    monkeypatch.setattr(gpu_stages, "LOSS_WIDTHS", (11,))
    budget = harness.Budget(3, seconds=1.0)
    names = ["strong eager", "composed", "streamed", "planlm"]
    found = {
        "blocks, bf16": gpu_stages.block_cases(["tiny"], "bf16", names, budget),
        "blocks, float32": gpu_stages.block_cases(["tiny"], "float32", names, budget),
        "losses": gpu_stages.losses(budget),
    }
    assert not list(gpu_page.failures(found))
    for dtype in ("bf16", "float32"):
        rows = found[f"blocks, {dtype}"]["cases"][f"tiny {dtype}"]["providers"]
        assert list(rows) == names
        assert all(row["eager"]["median"] > 0 and row["graph"]["median"] > 0 for row in rows.values())
    assert found["losses"]["11"]["error of gradient"] < 0.05
    printed = gpu_page.page(json.loads(json.dumps(found)))
    assert (
        "Block tiny bf16" in printed
        and "11 columns, planlm" in printed
        and "Not run: machine, tests, path, steps." in printed
    )


@pytest.mark.usefixtures("_cpu")
def test_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.MODELS, "tiny", TINY)
    monkeypatch.setitem(gpu_stages.STEPS, "tiny", (84, 2))
    found = {
        "steps, tiny": gpu_stages.steps("tiny", ["trainer plain", "eager joint", "planlm plain", "planlm joint"], 2)
    }
    assert not list(gpu_page.failures(found))
    rows = found["steps, tiny"]
    assert rows["tokens"] == 168
    assert rows["planlm plain"]["losses"][0] == pytest.approx(rows["trainer plain"]["losses"][0], rel=2e-2)
    assert rows["planlm joint"]["losses"][1] < rows["planlm joint"]["losses"][0]
    printed = gpu_page.page(json.loads(json.dumps(found)))
    assert "Training step of tiny" in printed and "eager joint" in printed


@pytest.mark.usefixtures("_cpu")
def test_what_fails_in_one_case_is_shown_and_the_next_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: step.Case) -> step.Step:
        raise RuntimeError("the device\nsays no")

    monkeypatch.setitem(step.MODELS, "tiny", TINY)
    monkeypatch.setitem(gpu_stages.STEPS, "tiny", (42, 2))
    monkeypatch.setitem(gpu_stages.STEP_PROVIDERS, "eager joint", broken)
    found = {"steps, tiny": gpu_stages.steps("tiny", ["eager joint", "planlm joint"], 2), "path": {"error": "lost"}}
    assert list(gpu_page.failures(found)) == [
        ("steps, tiny, eager joint", "RuntimeError: the device says no"),
        ("path", "lost"),
    ]
    printed = gpu_page.page(found)
    assert "FAILED  steps, tiny, eager joint: RuntimeError: the device says no" in printed
    assert found["steps, tiny"]["planlm joint"]["seconds"]["median"] > 0


def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("error: no CUDA device")


def test_a_stage_that_hangs_or_is_killed_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def in_new_process(run: Any, limit: float) -> Any:
        if getattr(run, "func", None) is gpu.tests:
            raise MachineError(f"the process of that case was killed after {limit:g} s")
        return {"tokens": 1, "flops": 1.0}

    monkeypatch.setattr(harness, "in_new_process", in_new_process)
    assert gpu.main([f"--out={tmp_path / 'out'}", "--stages=tests,steps", "--lms=gpt2", "--limit=3"]) == 1
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found["tests"]["error"].endswith("killed after 3 s") and found["steps, gpt2"]["tokens"] == 1
    assert (tmp_path / "out" / "gpu.txt").read_text() == capsys.readouterr().out.rstrip("\n") + "\n"
    monkeypatch.setattr(harness, "in_new_process", lambda run, limit: {"loss": [float("nan")]})
    assert gpu.main([f"--out={tmp_path / 'out'}", "--stages=path"]) == 1
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found["steps, gpt2"]["tokens"] == 1, "what another run has left"
    assert "FAILED  path, loss, 0: nan" in capsys.readouterr().out


def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "file").write_text("")
    (tmp_path / "gpu.json").write_text("no JSON")
    for out in (tmp_path, tmp_path / "file", tmp_path / "file" / "inside"):
        assert gpu.main([f"--out={out}"]) == 2
        assert capsys.readouterr().err.startswith(f"error: --out {out}: needs a folder of its own")


def start_another(file: str) -> None:
    """A process with a child, of which the file tells."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(file).write_text(str(child.pid))
    child.wait()


def test_a_process_that_takes_too_long_is_killed_with_what_it_started(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with pytest.raises(MachineError, match=r"killed after 20 s"):
        harness.in_new_process(start_another, str(file), limit=20)
    state = Path(f"/proc/{file.read_text()}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().split(")")[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("its child lives on")


def test_the_path_shows_what_a_command_says_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(gpu_path.CommandError, match="status 2: "):
        gpu_path._command(tmp_path, "train --corpus nothing --out run --lm none")
