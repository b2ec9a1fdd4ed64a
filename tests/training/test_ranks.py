"""Several processes train as one does: losses, checkpoints that change hands, every label once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from planlm import cli, distribution
from planlm.corpus.batches import PlanLoader
from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError, MachineError
from planlm.files import locked

STEPS = 50
ROOT = Path(__file__).parents[2]


def command(processes: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = (
        [] if processes == 1 else ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    )
    return subprocess.run(
        [sys.executable, "-m", *launcher, "planlm", *arguments],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def train(planted: dict[str, str], out: Path, processes: int, *flags: str) -> dict[str, Any]:
    settings = {
        "--corpus": planted["corpus"], "--lm": planted["lm"], "--out": out, "--steps": STEPS, "--batch-size": 5,
        "--window": 16, "--conditioned-layers": 2, "--log-every": 1, "--checkpoint-every": 20, "--accumulate": 2,
        "--planner": planted["planner"], "--planner-loss": 0.1, "--lm-mode": "full", "--precision": "fp32",
        "--keep-checkpoints": 9,
    }  # fmt: skip
    done = command(processes, ["train", *(str(part) for pair in settings.items() for part in pair), *flags, "--json"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n") == 1, "the first process alone prints the result"
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def logged(out: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def still(planted: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The planted corpus and LM with a planner without dropout, which no two numbers of processes draw alike."""
    out = tmp_path_factory.mktemp("planner") / "run"
    done = command(
        1,
        ["pretrain-planner", "--corpus", planted["corpus"], "--out", str(out), "--steps", "3", "--dropout", "0"],
    )
    assert done.returncode == 0, done.stderr
    return planted | {"planner": str(out)}


@pytest.fixture(scope="module")
def alone(still: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("ranks") / "alone"
    train(still, out, 1)
    return out


@pytest.mark.parametrize("flags", [[], ["--shard"]], ids=["replicated", "divided"])
@pytest.mark.parametrize("processes", [2, 3])
def test_losses_are_those_of_one_process(
    still: dict[str, str], alone: Path, tmp_path: Path, processes: int, flags: list[str]
) -> None:
    train(still, tmp_path / "run", processes, *flags)
    for key in ("loss", "planner_loss", "planner_entropy"):
        np.testing.assert_allclose(logged(tmp_path / "run", key), logged(alone, key), rtol=1e-5)
    assert logged(tmp_path / "run", "tokens") == logged(alone, "tokens")
    assert (tmp_path / "run/model/config.json").read_text() == (alone / "model/config.json").read_text()
    mine, wanted = (load_file(out / "model" / "model.safetensors") for out in (tmp_path / "run", alone))
    assert mine.keys() == wanted.keys()
    for name, value in wanted.items():  # of rounding errors, as the gradient of keys' biases is, Adam makes whole steps
        assert (mine[name] - value).norm() <= 1e-2 * value.norm() + 1e-6, name
    if processes == 2:
        return
    saved = tmp_path / "run" / "checkpoints"
    assert len(list((saved / "step-20").glob("*.safetensors"))) == 3
    for other in (1, 2):  # as if the three had been stopped after step 20
        for step in (40, 50):
            (saved / f"step-{step}").rename(tmp_path / f"{step} before {other}")
        train(still, tmp_path / "run", other, "--resume", *flags)
        np.testing.assert_allclose(logged(tmp_path / "run", "loss"), logged(alone, "loss"), rtol=1e-5)


def test_sampled_oracles_do_not_depend_on_who_draws(still: dict[str, str], tmp_path: Path) -> None:
    """Nor do processes without an item of their own stop a run, which under `oracle` have no action to show."""
    for selection, mix in (("soft", "0.5"), ("oracle", "0")):
        flags = ["--oracle-mix", mix, "--selection", selection]
        found = []
        for processes in (1, 3):
            out = tmp_path / f"{selection}{processes}"
            train(still, out, processes, "--steps", "12", "--batch-size", "7", *flags)
            found.append(logged(out, "loss"))
        np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.parametrize("flags", [[], ["--shard"]], ids=["replicated", "divided"])
def test_a_planner_that_reads_the_lm(still: dict[str, str], tmp_path: Path, flags: list[str]) -> None:
    """Some ranks see windows without sentences before them; the planner joins late; layers are computed again."""
    found = []
    reads = ["--planner-input", "lm", "--conditioned-layers", "1", "--checkpoint-activations", "--planner-lr", "1e-3"]
    for processes in (1, 2):
        out = tmp_path / str(processes)
        train(still, out, processes, "--steps", "8", *reads, *(flags if processes > 1 else []))
        found.append(logged(out, "loss"))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_ranks_validate_and_end_alike(still: dict[str, str], tmp_path: Path) -> None:
    """Divided and replicated, with ranks that have no window of a batch; every rank stops at the same step."""
    flags = ["--steps", "20", "--validate-every", "2", "--validate-documents", "3", "--patience", "2"]
    flags += ["--lm-lr", "1", "--warmup", "0", "--schedule", "constant", "--max-grad-norm", "1e9"]
    found = [train(still, tmp_path / str(size), size, *flags, *more) for size, more in ((2, ["--shard"]), (3, []))]
    assert found[0]["step"] == found[0]["best_step"] + 4 < 20
    for key in ("step", "best_step"):
        assert found[0][key] == found[1][key]
    np.testing.assert_allclose(found[1]["best_loss"], found[0]["best_loss"], rtol=1e-4)


def test_ranks_share_what_guards_against_forgetting(still: dict[str, str], tmp_path: Path) -> None:
    """Divided with LoRA to leave out, replicated with a copy of the LM; each against one process."""
    flags = [
        "--steps",
        "5",
        "--kl",
        "2",
        "--rehearsal",
        still["corpus"],
        "--rehearsal-weight",
        "0.5",
        "--lm-lr",
        "1e-2",
    ]
    for lm_mode, size, more in (("lora", 2, ["--shard"]), ("full", 3, [])):
        outs = [tmp_path / f"{lm_mode}{count}" for count in (1, size)]
        train(still, outs[0], 1, *flags, "--lm-mode", lm_mode)
        train(still, outs[1], size, *flags, "--lm-mode", lm_mode, *more)
        for key in ("loss", "kl", "rehearsal_loss"):
            found, wanted = (logged(out, key) for out in reversed(outs))
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_epoch_has_every_token_as_a_label_once(planted: dict[str, str], ranks: int) -> None:
    """Whatever the number of processes and wherever they are started anew."""
    dataset = PreparedCorpus.load(planted["corpus"]).split("train")
    random = np.random.default_rng(ranks)
    counts: Counter[tuple[int, int]] = Counter()  # of documents and tokens
    state = None
    for _ in range(1000):
        loaders = [PlanLoader(dataset, window=16, batch_size=5, seed=3, pack=True) for _ in range(ranks)]
        for rank, loader in enumerate(loaders):
            loader.share = (rank, ranks)
            if state is not None:
                loader.load_state_dict(state)
        begun = loaders[0].state_dict()
        steps = min(int(random.integers(1, 9)), loaders[0].num_batches - begun["batch"])
        for loader in loaders:
            batches = iter(loader)
            for _ in range(steps):
                batch = next(batches)
                scored = batch.labels != -100
                counts.update(zip(batch.documents[scored].tolist(), batch.labels[scored].tolist(), strict=True))
        state = loaders[0].state_dict()
        assert all(loader.state_dict() == state for loader in loaders)
        if state["batch"] == loaders[0].num_batches:
            break
    every = ((document, token) for document, ids in enumerate(dataset["input_ids"]) for token in ids[1:])
    assert counts == Counter(every)


def test_two_processes_evaluate_as_one_does(alone: Path, still: dict[str, str], tmp_path: Path) -> None:
    tables = []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        shutil.copytree(alone, run)
        flags = ["--corpus", still["corpus"], "--plans", "none,hard,soft,shuffled,sampled", "--window", "16"]
        flags += ["--versus", "none", "--num-plans", "2"]
        done = command(processes, ["evaluate", str(run), *flags, "--batch-size", "5", "--json"])
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("\n") == 1
        result = json.loads((run / "evaluation.json").read_text())["test"]
        assert {**json.loads(done.stdout), "scores": 0} == {**result, "scores": 0}
        tables.append(result)
    first, second = tables
    assert second["scores"]["tokens"] == first["scores"]["tokens"]
    for plan, scores in first["scores"]["nll"].items():
        np.testing.assert_allclose(second["scores"]["nll"][plan], scores, rtol=1e-6)
        parts = [table["scores"]["position_nll"][plan] for table in tables]
        np.testing.assert_allclose(*parts, rtol=1e-6, atol=1e-4)
    assert second["scores"]["position_tokens"] == first["scores"]["position_tokens"]
    assert second["planner"] == first["planner"]


def test_three_processes_prepare_the_same_bytes(planted: dict[str, str], tmp_path: Path) -> None:
    texts = [" ".join(f"Mill number {number} made {n} sacks of flour." for n in range(9)) for number in range(70)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = []
    for processes in (1, 3):
        out = tmp_path / f"corpus{processes}"
        flags = ["--out", str(out), "--tokenizer", planted["lm"], "--actions", "7", "--shard-documents", "8"]
        done = command(processes, ["prepare", str(tmp_path / "texts.jsonl"), *flags, "--json"])
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["num_actions"] == 7
        files = {file.relative_to(out): file.read_bytes() for file in out.rglob("*") if file.is_file()}
        assert not (out / "partial").exists()
        found.append(files)
    assert found[0] == found[1]


def test_a_mistake_is_one_line(planted: dict[str, str], tmp_path: Path) -> None:
    done = command(2, ["evaluate", str(tmp_path / "nowhere"), "--corpus", planted["corpus"]])
    assert done.returncode != 0
    assert len([line for line in done.stderr.splitlines() if line.startswith("planlm: error")]) == 1, done.stderr


def test_too_small_a_batch_is_refused(planted: dict[str, str], tmp_path: Path) -> None:
    done = command(3, ["train", "--corpus", planted["corpus"], "--out", str(tmp_path / "run"), "--batch-size", "2"])
    assert done.returncode != 0 and "--batch-size 2: 3 processes share it" in done.stderr
    assert not (tmp_path / "run").exists()


def test_other_commands_run_in_one_process() -> None:
    done = command(2, ["doctor"])
    assert done.returncode != 0 and "planlm doctor runs in one process" in done.stderr


def test_two_processes_pretrain_the_planner_as_one_does(planted: dict[str, str], tmp_path: Path) -> None:
    for processes in (1, 2):
        out = tmp_path / str(processes)
        flags = ["--corpus", planted["corpus"], "--out", str(out), "--steps", "12", "--log-every", "1"]
        done = command(processes, ["pretrain-planner", *flags, "--dropout", "0", "--batch-size", "7"])
        assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(logged(tmp_path / "2", "loss"), logged(tmp_path / "1", "loss"), rtol=1e-5)


def test_who_is_left_alone_calls_it_no_bug(still: dict[str, str], tmp_path: Path) -> None:
    """One of two processes is killed, as the system does when memory ends."""
    out = str(tmp_path / "run")
    flags = ["train", "--corpus", still["corpus"], "--lm", still["lm"], "--out", out, "--window", "16"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "planlm"]
    process = subprocess.Popen(
        [*launcher, *flags, "--conditioned-layers", "2", "--steps", "100000", "--log-every", "1"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for _ in range(1200):
        if (tmp_path / "run" / "metrics.jsonl").exists():
            break
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = [child for child in children if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()]
    os.kill(int(second), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "bug in PlanLM" not in errors, errors
    assert errors.count("planlm: error") == errors.count("planlm: error: another process of this run has ended"), errors


IMPATIENT = """
import sys
from planlm import heartbeat
heartbeat.EVERY, heartbeat.PATIENCE = 0.2, 3.0
from planlm.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_process_is_named_and_holds_nobody(still: dict[str, str], tmp_path: Path, frozen: int) -> None:
    """Stopped, as by a debugger or a machine that swaps, it would hold the others until their collectives give up."""
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    out = str(tmp_path / "run")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = ["train", "--corpus", still["corpus"], "--lm", still["lm"], "--out", out, "--window", "16"]
    process = subprocess.Popen(
        [*launcher, str(tmp_path / "impatient.py"), *flags, "--conditioned-layers", "2", "--steps", "100000"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    for _ in range(1200):
        if (tmp_path / "run" / "metrics.jsonl").exists():
            break
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    mark = f"\0RANK={frozen}\0".encode()
    (victim,) = [child for child in children if mark in Path(f"/proc/{child}/environ").read_bytes()]
    os.kill(int(victim), signal.SIGSTOP)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(victim), signal.SIGKILL)
    assert process.returncode != 0
    who = (
        rf"planlm: error: process {1 - frozen}: process {frozen} of 2 \(process {victim} on \S+\) has not answered for"
    )
    assert re.search(who, errors), errors
    assert "Traceback" not in errors.split("planlm: error")[0]


def test_a_live_run_is_left_alone(still: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run" / "lock"):
        flags = ["--corpus", still["corpus"], "--lm", still["lm"], "--out", str(tmp_path / "run"), "--window", "16"]
        done = command(2, ["train", *flags, "--steps", "2"])
    said = [line for line in done.stderr.splitlines() if line.startswith("planlm: error")]
    assert done.returncode != 0 and len(said) == 1
    assert f"run: process {os.getpid()} on " in said[0] and "is at work on this run" in said[0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two': expected a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0': expected a number from 1"),
        ({"WORLD_SIZE": "9" * 30}, "WORLD_SIZE='999"),
        ({"WORLD_SIZE": "2"}, "RANK is not set though WORLD_SIZE is"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK='2': expected a number from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "2", "RANK": "1.5\n"}, "RANK='1.5\\n'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"}, "to 65535"),
    ],
)
def test_what_torchrun_cannot_have_said_is_refused(
    environment: dict[str, str], says: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "--corpus", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and says in printed.err, printed.err


def test_a_rank_without_others_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left in the environment, it must not keep the result back."""
    monkeypatch.setenv("RANK", "3")
    assert (distribution.rank(), distribution.world_size()) == (0, 1)


def test_processes_that_do_not_come_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distribution, "RENDEZVOUS_TIMEOUT", timedelta(seconds=1))
    missed = pytest.raises(MachineError, match=rf"not all 2 processes have met at localhost:{port}")
    with missed, distribution.process_group():
        pass


def exchanged(devices: list[str]) -> list[str]:
    """What each of several ranks says to `check_devices`."""
    store = dist.HashStore()

    def check(number: int) -> str:
        try:
            distribution.check_devices(store, number, len(devices), devices[number])
        except (InputError, distribution.RankZeroFailed) as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(devices)) as pool:
        return list(pool.map(check, range(len(devices))))


def test_two_ranks_on_one_gpu_are_refused_by_one_of_them() -> None:
    assert exchanged(["a, 1", "a, 2", "b, 1"]) == [""] * 3
    said = exchanged(["a, 1", "a, 2", "b, 7", "a, 2"])
    assert [bool(line) and line != "2" for line in said] == [False, True, False, False]
    assert said[1].startswith("processes 1 and 3 were given the same GPU (a, 2); start at most one process for each")
    assert [said[number] for number in (0, 2, 3)] == ["2"] * 3, "status 2, without a line"


def test_nccl_is_told_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the group between hosts is gloo's: what they say to each other must not wait for a GPU."""
    asked: list[Any] = []
    where = torch.device("cuda", 1)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "h"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    store = dist.HashStore()
    store.set("planlm/device/0", "another")
    monkeypatch.setattr(distribution, "device", lambda: where)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(distribution, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    monkeypatch.setattr(distribution, "Heartbeat", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: asked.append((backend, how)))
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: asked.append((backend, timeout)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with distribution.process_group():
        pass
    set_to, (backend, how), (between, patience) = asked
    assert (set_to, backend, how["device_id"], between) == (where, "nccl", where, "gloo")
    assert timedelta(minutes=5) <= how["timeout"] <= timedelta(hours=1) <= patience
    assert (how["rank"], how["world_size"]) == (1, 2)
