"""`--graph` as far as it goes without a GPU: what is refused, which batches share a graph, what it computes with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from planlm.config import TrainConfig
from planlm.corpus.batches import PlanLoader
from planlm.errors import InputError, MachineError
from planlm.kernels import checks, use_backend
from planlm.model import loss, masks
from planlm.plan_inputs import Movable
from planlm.training import graphs
from planlm.training.graphs import Graphs, has_graphs
from planlm.training.train import train

from .tape import Captures
from .test_waits import WAYS

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"checkpoint_activations": True, "loss_kernel": "liger"}, 1, "--checkpoint-activations, --loss-kernel liger;"),
        ({"shard": True}, 2, "a step with --shard; leave"),
    ],
)
def test_what_cannot_be_captured_is_refused(changes: dict[str, Any], ranks: int, message: str) -> None:
    """Where it is asked for; by default such a step runs without."""
    config = TrainConfig(corpus="nowhere", out="nowhere", **changes)
    assert not has_graphs(config, CUDA, ranks)
    with pytest.raises(InputError, match=message):
        has_graphs(TrainConfig(corpus="nowhere", out="nowhere", graph="always", **changes), CUDA, ranks)


def test_graphs_are_made_where_they_can_be() -> None:
    asked = {graph: TrainConfig(corpus="nowhere", out="nowhere", graph=graph) for graph in ("auto", "always", "never")}
    assert [has_graphs(asked[graph], CUDA, 1) for graph in asked] == [True, True, False]
    assert [has_graphs(asked[graph], CUDA, 2) for graph in asked] == [False, True, False]
    assert not has_graphs(asked["auto"], torch.device("cpu"), 1)


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(InputError, match=r"^--graph always: needs CUDA, and this is cpu; leave it out$"):
        train(TrainConfig(corpus="nowhere", out="nowhere", graph="always"))


class Batch(Movable):
    """A few tensors and a number."""

    def __init__(self, values: Tensor, size: int, inner: Movable | None = None) -> None:
        self.values, self.size, self.inner = values, size, inner


def test_a_shape_is_captured_at_its_second_time_and_replayed_with_new_values() -> None:
    capture, ran = Captures(), []

    def run(batch: Batch, more: list[Tensor]) -> Tensor:
        ran.append(batch)
        inner = 0 if batch.inner is None else batch.inner.values.sum()
        return batch.values.sum() * batch.size + more[0] + inner

    graph = Graphs(run, capture=capture)

    def at(values: Tensor, size: int = 1, state: object = "a", more: float = 0.0, inner: Any = None) -> float:
        return graph(Batch(values, size, inner), [torch.tensor(more)], state).item()

    assert [at(torch.full((3,), value)) for value in (1.0, 2.0, 5.0)] == [3.0, 6.0, 15.0]
    assert capture.captured == 1
    first, *others = ran
    assert len(others) == 1 and others[0] is not first, "what is captured computes in a place of its own"
    assert at(torch.ones(3), more=4.0) == 7.0
    inner = Batch(torch.ones(2), 1)
    others_made = [
        lambda: at(torch.ones(4)), lambda: at(torch.ones(3), size=2), lambda: at(torch.ones(3), state="b"),
        lambda: at(torch.ones(3, dtype=torch.float64)), lambda: at(torch.ones(3), inner=inner),
    ]  # fmt: skip
    for number, other in enumerate(others_made, 2):
        assert other() == other() == other()
        assert capture.captured == number
    assert at(torch.full((3,), 7.0)) == 21.0 and capture.captured == 1 + len(others_made)


def test_what_cannot_be_captured_is_an_error_that_says_what_helps() -> None:
    graph = Graphs(lambda batch, more: batch.values.sum() + more[0].item(), Captures())

    def step() -> Tensor:
        return graph(Batch(torch.ones(3), 1), [torch.tensor(2.0)], "a")

    assert step() == 5.0
    with pytest.raises(MachineError, match=r"\(_local_scalar_dense: operation not .*\); leave .* with --graph never$"):
        step()


def test_of_two_errors_in_a_capture_the_first_is_named() -> None:
    def fail(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        try:
            raise ValueError("what is wrong")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    graph = Graphs(lambda batch, more: batch.values, fail)
    graph(Batch(torch.ones(3), 1), [], "a")
    with pytest.raises(MachineError, match=r"\(what is wrong\)"):
        graph(Batch(torch.ones(3), 1), [], "a")


GRAPHED = WAYS | {
    "ratio falls": {"oracle_mix": "0.8:0", "lm_mode": "full"},
    "ratio falls, convex": {"oracle_mix": "0.8:0", "oracle_mode": "convex", "lm_mode": "full"},
    "ratio switches": {"oracle_mix": "1:0", "oracle_schedule": "switch", "oracle_mode": "convex", "planner_loss": 0.1},
    "codebook joins": {"unfreeze_codebook_at": 0.3, "log_every": 4},
    "one batch a step": {"accumulate": 1, "planner_loss": 0.1, "lm_mode": "full"},
}


@pytest.mark.parametrize("way", GRAPHED)
def test_steps_are_those_without_graphs(
    way: str, planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same batches, whose shapes decide what dropout draws. The planner joins: then it is another graph.

    Adam makes steps of a learning rate of any gradient, rounding too: what is wrong shows by 1e-3.
    """
    capture = Captures()
    monkeypatch.setattr("planlm.training.train.matrix_product_rate", lambda *_: 1e9)
    monkeypatch.setattr("planlm.training.train.has_graphs", lambda config, *_: config.graph == "always")
    monkeypatch.setattr(graphs, "_Captures", lambda: capture)
    monkeypatch.setattr(PlanLoader, "alike", property(lambda self: True, lambda self, alike: None))
    monkeypatch.setattr(checks, "_readable", lambda tensor: False)
    monkeypatch.setattr(loss, "_check_labels", lambda labels, vocabulary: None)
    monkeypatch.setattr(masks, "_may_ask", lambda device: False)
    changes = GRAPHED[way] | ({"rehearsal": planted["corpus"]} if "rehearsal" in GRAPHED[way] else {})
    found = []
    for graph in ("never", "always"):
        out = tmp_path / graph
        settings = {
            "window": 16, "batch_size": 4, "steps": 10, "accumulate": 2, "log_every": 1, "unfreeze_planner_at": 0.5,
        } | changes  # fmt: skip
        with use_backend("reference"):
            train(
                TrainConfig(
                    corpus=planted["corpus"], lm=planted["lm"], out=str(out), precision="fp32", graph=graph, **settings
                )
            )
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        names = ("loss", "tokens", "lm_loss")
        found.append(([[line[name] for name in names] for line in lines], load_file(out / "model/model.safetensors")))
    assert capture.captured and capture.replayed > capture.captured
    (plain, wanted), (replayed, weights) = found
    torch.testing.assert_close(torch.tensor(replayed), torch.tensor(plain), rtol=1e-5, atol=1e-6)
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-4)


RECORDED = """
import sys
from planlm.cli import main
from planlm.corpus.batches import PlanLoader
from planlm.kernels import checks, use_backend
from planlm.model import loss, masks
from planlm.training import graphs, train
from tests.training.tape import Captures

capture = Captures()
train.matrix_product_rate = lambda *_: 1e9
train.has_graphs = lambda config, *_: config.graph == "always"
graphs._Captures = lambda: capture
PlanLoader.alike = property(lambda self: True, lambda self, alike: None)
checks._readable = masks._may_ask = lambda asked: False
loss._check_labels = lambda labels, vocabulary: None
with use_backend("reference"):
    status = main(sys.argv[1:])
assert capture.replayed > capture.captured > 0 or "never" in sys.argv
sys.exit(status)
"""


def test_two_ranks_with_graphs_train_as_two_without(planted: dict[str, str], tmp_path: Path) -> None:
    """Gradients of two micro-batches and a guard are averaged behind the graphs, those of the planner once it joins."""
    (tmp_path / "recorded.py").write_text(RECORDED)
    settings = {
        "--corpus": planted["corpus"], "--lm": planted["lm"], "--window": 16, "--batch-size": 4, "--steps": 10,
        "--accumulate": 2, "--log-every": 1, "--unfreeze-planner-at": 0.5, "--lm-mode": "full", "--kl": 0.1,
        "--precision": "fp32", "--conditioned-layers": 2, "--oracle-mix": 0.5,
    }  # fmt: skip
    given = [str(part) for pair in settings.items() for part in pair]
    found = []
    for graph in ("never", "always"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run(
            [*launch, tmp_path / "recorded.py", "train", *given, "--out", tmp_path / graph, "--graph", graph],
            capture_output=True, text=True, timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(load_file(tmp_path / graph / "model/model.safetensors"))
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-4, atol=1e-4)
