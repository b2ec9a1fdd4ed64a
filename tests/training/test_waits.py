"""A training step in which the host waits for no device: counted, and run on a device without data."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from planlm.config import TrainConfig
from planlm.corpus.store import PreparedCorpus
from planlm.errors import MachineError
from planlm.kernels import checks, use_backend
from planlm.model import loss, masks
from planlm.model.planner import Planner
from planlm.selections import SELECTIONS
from planlm.training import train as training
from planlm.training.figures import Ledger
from planlm.training.forgetting import Guards, WithRehearsal, base_model
from planlm.training.groups import blank_state, make_optimizer, optimizer_tensors, trainable_groups
from planlm.training.loop import Task, update
from planlm.training.objective import Objective
from planlm.training.parallel import Parallel
from planlm.training.start import starting_model

WAYS: dict[str, dict[str, Any]] = {
    **{selection: {"selection": selection} for selection in SELECTIONS},
    "top-k": {"selection": "top-k", "top_k": 2},
    "none": {"selection": "none", "lm_mode": "full"},
    "embedding": {"conditioning": "embedding", "gate": True},
    "insert": {"conditioning": "insert"},
    "bottleneck": {"conditioning": "bottleneck", "selection": "fixed"},
    "a codebook per layer": {"codebook_per_layer": True, "gate": True},
    "the LM's states": {"planner_input": "lm", "lm_mode": "full"},
    "both inputs": {"planner_input": "both", "lm_mode": "lora", "planner_loss": 0.1},
    "planner loss": {"planner_loss": 0.1, "lm_mode": "lora"},
    "planner loss, shuffled": {"planner_loss": 0.1, "selection": "shuffled"},
    "sampled oracles": {"oracle_mix": "0.5", "lm_mode": "full"},
    "convex oracles": {"oracle_mix": "0.5", "oracle_mode": "convex"},
    "guards": {"lm_mode": "full", "kl": 0.1, "rehearsal": "corpus"},
    "guards, lora, insert": {"lm_mode": "lora", "kl": 0.1, "rehearsal": "corpus", "conditioning": "insert"},
    "a short window": {"attention_window": 5, "lm_mode": "full"},
    "computed again": {"checkpoint_activations": True, "lm_mode": "full"},
    "dropout": {"lm_dropout": 0.1, "lm_mode": "full"},
}

TIMES = ("tokens_per_second", "waiting", "memory", "seconds", "seconds_left", "utilisation")

WAITS = {"nonzero", "_local_scalar_dense", "item", "is_nonzero", "masked_select", "equal", "unique_dim", "_unique2"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_", "lift_fresh"}


class Watch(TorchDispatchMode):
    """Notes the operators for which a host would wait, if its tensors were a GPU's: by name and place."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.partition("::")[2]
        by_mask = name in INDEXED and any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1])
        found = function(*args, **(kwargs or {}))
        devices = {one.device.type for one in (*args, found) if isinstance(one, Tensor)}
        if name in WAITS or by_mask or (name in COPIES and len(devices) > 1):
            ours = [frame for frame in traceback.extract_stack() if "/planlm/" in frame.filename]
            ours += [frame for frame in traceback.extract_stack() if "/transformers/" in frame.filename]
            self.places[f"{name} at {ours[-1].filename}:{ours[-1].lineno}" if ours else name] += 1
        return found


def prepared(
    planted: dict[str, str], tmp_path: Path, device: str, changes: dict[str, Any]
) -> tuple[Task, torch.optim.AdamW, list[Any], TrainConfig]:
    """What `train` trains, and the batches of a step of two."""
    changes = changes | ({"rehearsal": planted["corpus"]} if "rehearsal" in changes else {})
    config = TrainConfig(
        **{
            "corpus": planted["corpus"], "lm": planted["lm"], "out": str(tmp_path), "window": 32, "batch_size": 4,
            "accumulate": 2, "precision": "fp32", "unfreeze_planner_at": 0.0, **changes,
        }
    )  # fmt: skip
    corpus = PreparedCorpus.load(config.corpus)
    planner = Planner.of_codebook(corpus.codebook, horizon=2)
    model = starting_model(config, corpus, planted["lm"], planner)
    base = base_model(model, config)
    model, base = (None if one is None else one.to(device) for one in (model, base))
    loader: Any = training._loader(config, corpus.split("train"))
    loader.horizon = 2
    if config.rehearsal:
        loader = WithRehearsal(loader, training._loader(config, corpus.split("validation")))
    parallel = Parallel(model)
    guards = Guards(parallel, config, base) if config.kl > 0 else None
    objective = Objective(parallel, config, 10, guards)
    groups = trainable_groups(model, config, 10)
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
    batches = list(islice(loader, 2))

    def moved(batch: Any) -> Any:
        return tuple(map(moved, batch)) if isinstance(batch, tuple) else batch.to(device)

    task = Task(model=parallel, groups=groups, loader=loader, accumulate=2, steps=10, backward=objective.backward)
    return task, make_optimizer(groups, 0.0), list(map(moved, batches)), config


def request_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have figures read as on a GPU: when there is a reason to, and not at once."""
    for module in ("loop", "objective"):
        monkeypatch.setattr(f"planlm.training.{module}.read_on_cpu", lambda figures: figures)
    monkeypatch.setattr(Ledger, "note", lambda self, **noted: self._unread.append(noted))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks at values on a CPU, where that costs nothing, does not look."""
    request_late(monkeypatch)
    monkeypatch.setattr(checks, "_readable", lambda tensor: False)
    monkeypatch.setattr(loss, "_check_labels", lambda labels, vocabulary: None)
    monkeypatch.setattr(masks, "_may_ask", lambda device: False)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("way", WAYS)
def test_a_step_of_two_micro_batches_has_no_wait(way: str, planted: dict[str, str], tmp_path: Path) -> None:
    task, optimizer, batches, config = prepared(planted, tmp_path, "cpu", WAYS[way])
    with use_backend("reference"), Watch() as watch:
        figures, skipped = update(task, optimizer, 0, batches, config)
    assert not watch.places
    assert skipped == 0 and figures["loss"] > 0 and figures["grad_norm"]


def test_what_is_read_late_is_what_is_read_at_once(
    planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With two steps that are skipped, one of them between two log lines; and resumed in between."""
    monkeypatch.setattr("planlm.training.train.matrix_product_rate", lambda *_: 1e9)
    backward = Objective.backward

    def broken(self: Objective, step: int, batches: list[Any]) -> dict[str, Any]:
        figures = backward(self, step, batches)
        if step in (1, 5):
            next(parameter for parameter in self.model.parameters() if parameter.grad is not None).grad.fill_(torch.nan)
        return figures

    monkeypatch.setattr(Objective, "backward", broken)
    made = {}
    for name, late in (("at once", False), ("late", True), ("resumed", True)):
        if late:
            request_late(monkeypatch)
        config = TrainConfig(
            corpus=planted["corpus"], lm=planted["lm"], out=str(tmp_path / name), window=16, batch_size=4, steps=8,
            log_every=3, checkpoint_every=4, precision="fp32", validate_every=7, validate_documents=2,
        )  # fmt: skip
        training.train(config)
        said = [line for line in capsys.readouterr().err.splitlines() if "non-finite" in line]
        if name == "resumed":
            for checkpoint in ("step-7", "step-8"):
                shutil.rmtree(tmp_path / name / "checkpoints" / checkpoint)
            training.train(dataclasses.replace(config, resume=True))
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        figures = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
        state = json.loads((tmp_path / name / "checkpoints/step-8/state.json").read_text())
        tensors = (tmp_path / name / "checkpoints/step-8/tensors.safetensors").read_bytes()
        made[name] = (said, figures, state["tokens"], state["skipped"], tensors)
    assert made["late"] == made["resumed"] == made["at once"]
    assert [line.strip() for line in made["late"][0]] == [
        f"step {step}: non-finite loss or gradient, step skipped (1 in a row)" for step in (2, 6)
    ]


def test_steps_that_are_skipped_one_after_the_other_end_a_run_at_the_next_look(
    planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though those behind them were not skipped; nothing of them is kept."""
    monkeypatch.setattr("planlm.training.train.matrix_product_rate", lambda *_: 1e9)
    backward = Objective.backward

    def lost(self: Objective, step: int, batches: list[Any]) -> dict[str, Any]:
        return backward(self, step, batches) | ({"loss": torch.tensor(torch.inf)} if 3 <= step < 13 else {})

    monkeypatch.setattr(Objective, "backward", lost)
    request_late(monkeypatch)
    config = TrainConfig(
        corpus=planted["corpus"], lm=planted["lm"], out=str(tmp_path / "run"), window=16, batch_size=4, steps=30,
        log_every=20, checkpoint_every=20, precision="fp32",
    )  # fmt: skip
    with pytest.raises(MachineError, match=r"^step 13: 10 steps in a row skipped"):
        training.train(config)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch refuses on its device without data, though nothing is computed there."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cuda": device != "meta" and enabled(device))

    def cast(device: str, *args: Any, **options: Any) -> Any:
        return contextlib.nullcontext() if device == "meta" else autocast(device, *args, **options)

    monkeypatch.setattr(torch, "autocast", cast)
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None)


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize("way", WAYS)
def test_a_step_runs_on_a_device_without_data(way: str, planted: dict[str, str], tmp_path: Path) -> None:
    """There to look at a value is an error, and what was left on the CPU is noticed; a resumed one too."""
    task, optimizer, batches, config = prepared(planted, tmp_path, "meta", WAYS[way])
    with use_backend("reference"), Watch() as watch:
        figures, skipped = update(task, optimizer, 0, batches, config)
        names = list(optimizer_tensors(task.groups, optimizer))
        again = make_optimizer(task.groups, 0.0)
        blank_state(task.groups, again, names)
        update(task, again, 1, batches, config)
    assert not watch.places
    assert skipped.is_meta and figures["loss"].is_meta and figures["tokens"].is_meta
    assert list(optimizer_tensors(task.groups, again)) == names
    for name, value in optimizer_tensors(task.groups, again).items():
        assert value.is_meta, name


def test_what_waits_is_seen() -> None:
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    cases: dict[str, Callable[[], Any]] = {
        "_local_scalar_dense": lambda: float(values.sum()),
        "index": lambda: values[mask],
        "nonzero": lambda: mask.nonzero(),
        "_to_copy": lambda: values.to("meta"),
    }
    for name, waits in cases.items():
        with Watch() as watch:
            waits()
        assert [place.partition(" ")[0] for place in watch.places] == [name]
