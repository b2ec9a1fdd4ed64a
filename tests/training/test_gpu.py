"""Training on a CUDA device: steps that wait for nothing, graphs of them, batches on their way."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from planlm.config import TrainConfig
from planlm.corpus.batches import PlanLoader
from planlm.corpus.store import PreparedCorpus
from planlm.training import graphs
from planlm.training.loop import update
from planlm.training.prefetch import Prefetch
from planlm.training.train import train
from planlm.training.transport import Transport

from .test_graphs import GRAPHED
from .test_waits import WAYS, prepared

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_waits_for_nothing(way: str, precision: str, planted: dict[str, str], tmp_path: Path) -> None:
    """By CUDA's own word, in the second step: the first compiles, and asks the device what it is."""
    task, optimizer, batches, config = prepared(planted, tmp_path, "cuda", {"precision": precision} | WAYS[way])
    update(task, optimizer, 0, batches, config)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        figures, skipped = update(task, optimizer, 1, batches, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(skipped) == 0 and float(figures["loss"]) > 0


IN_GRAPHS = GRAPHED | {"compiled": {"compile": True, "lm_mode": "full"}}


@pytest.mark.parametrize("way", IN_GRAPHS)
def test_steps_in_graphs_are_those_without(
    way: str, planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same batches, by `train` itself."""
    captured: list[object] = []
    capture = graphs._Captures.__call__
    monkeypatch.setattr(graphs._Captures, "__call__", lambda *given: captured.append(given) or capture(*given))
    monkeypatch.setattr(PlanLoader, "alike", property(lambda self: True, lambda self, alike: None))
    changes = IN_GRAPHS[way] | ({"rehearsal": planted["corpus"]} if "rehearsal" in IN_GRAPHS[way] else {})
    can = not changes.get("checkpoint_activations")
    found = []
    for graph in ("never", "always" if can else "auto"):
        out = tmp_path / graph
        settings = {
            "window": 16, "batch_size": 4, "steps": 12, "accumulate": 2, "log_every": 1, "unfreeze_planner_at": 0.5,
        } | changes  # fmt: skip
        train(
            TrainConfig(
                corpus=planted["corpus"], lm=planted["lm"], out=str(out), precision="fp32", graph=graph, **settings
            )
        )
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        found.append([[line[name] for name in ("loss", "tokens")] for line in lines])
    assert bool(captured) == can
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-3, atol=1e-4)


def test_batches_arrive_as_they_were_made(planted: dict[str, str]) -> None:
    split = PreparedCorpus.load(planted["corpus"]).split("train")

    def loader() -> PlanLoader:
        return PlanLoader(split, window=16, batch_size=3, pack=True, with_others=True)

    made = list(islice(loader(), 6))
    with Prefetch(loader(), 2, Transport(torch.device("cuda", 0))) as arrived:
        for batch in made:
            there = next(arrived)
            torch.cuda._sleep(10_000_000)  # the next copies are made while this one is still to be used
            doubled = [2 * tensor for tensor in there.tensors()]
            for one, other in zip(doubled, batch.tensors(), strict=True):
                assert one.is_cuda and torch.equal(one.cpu(), 2 * other)
