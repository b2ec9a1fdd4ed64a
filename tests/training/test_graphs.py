"""`--graph` as far as it goes without a GPU: what is refused, which batches share a graph, what it computes with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from planlm.config import TrainConfig
from planlm.errors import InputError
from planlm.plan_inputs import Movable
from planlm.training import graphs
from planlm.training.graphs import Graphs, has_graphs
from planlm.training.train import train

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"compile": True}, 1, "a step with --compile; leave"),
        ({"checkpoint_activations": True, "loss_kernel": "liger"}, 1, "--checkpoint-activations, --loss-kernel liger;"),
        ({}, 2, "a step with several processes; leave"),
    ],
)
def test_what_cannot_be_captured_is_refused(changes: dict[str, Any], ranks: int, message: str) -> None:
    """Where it is asked for; by default such a step runs without."""
    config = TrainConfig(corpus="nowhere", out="nowhere", **changes)
    assert not has_graphs(config, CUDA, ranks)
    with pytest.raises(InputError, match=message):
        has_graphs(TrainConfig(corpus="nowhere", out="nowhere", graph="on", **changes), CUDA, ranks)


def test_graphs_are_made_where_they_can_be() -> None:
    asked = {graph: TrainConfig(corpus="nowhere", out="nowhere", graph=graph) for graph in ("auto", "on", "off")}
    assert [has_graphs(asked[graph], CUDA, 1) for graph in asked] == [True, True, False]
    assert not has_graphs(asked["auto"], torch.device("cpu"), 1)


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(InputError, match=r"^--graph on: needs CUDA, and this is cpu; leave it out$"):
        train(TrainConfig(corpus="nowhere", out="nowhere", graph="on"))


class Batch(Movable):
    """A few tensors and a number."""

    def __init__(self, values: Tensor, size: int, inner: Movable | None = None) -> None:
        self.values, self.size, self.inner = values, size, inner


class Replayed:
    """Captures as CUDA does: computes with the memory that it was captured with, and not before it is replayed."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captured += 1
        return run


def test_a_shape_is_captured_at_its_second_time_and_replayed_with_new_values() -> None:
    capture, ran = Replayed(), []

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
    assert len({id(batch) for batch in others}) == 1 and others[0] is not first, "replays compute in one place"
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


@pytest.mark.parametrize("needed", [False, True])
def test_what_cannot_be_captured_runs_as_it_is_or_is_an_error(needed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(_: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    graph = Graphs(lambda batch, more: batch.values.sum() + more[0], needed, refuse)

    def step() -> float:
        return graph(Batch(torch.ones(3), 1), [torch.tensor(2.0)], "a").item()

    assert step() == 5.0
    if needed:
        with pytest.raises(RuntimeError, match="not permitted"):
            step()
        return
    assert step() == step() == step() == 5.0
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("and runs without: operation not permitted when stream is capturing")


@pytest.mark.parametrize("changes", [{}, {"oracle_mix": "0.8:0"}, {"oracle_mix": "0.8:0", "oracle_mode": "convex"}])
def test_steps_are_those_without_graphs(
    changes: dict[str, Any], planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planner joins in between: what trains is another graph. Its dropout would be drawn for other shapes."""
    monkeypatch.setattr("torch.nn.functional.dropout", lambda x, *_, **__: x)
    capture = Replayed()
    monkeypatch.setattr("planlm.training.train.matrix_product_rate", lambda *_: 1e9)
    monkeypatch.setattr("planlm.training.train.has_graphs", lambda config, *_: config.graph == "on")
    monkeypatch.setattr(graphs, "_Captures", lambda: capture)
    found = []
    for graph in ("off", "on"):
        out = tmp_path / graph
        train(
            TrainConfig(
                corpus=planted["corpus"], lm=planted["lm"], out=str(out), window=16, batch_size=4, steps=8,
                accumulate=2, log_every=1, precision="fp32", planner_loss=0.1, lm_mode="full", unfreeze_planner_at=0.5,
                graph=graph, **changes,
            )
        )  # fmt: skip
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        names = ("loss", "planner_loss", "planner_entropy", "tokens")
        found.append(([[line[name] for name in names] for line in lines], load_file(out / "model/model.safetensors")))
    assert capture.captured > 1
    (plain, wanted), (replayed, weights) = found
    torch.testing.assert_close(torch.tensor(replayed), torch.tensor(plain), rtol=1e-5, atol=1e-6)
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
