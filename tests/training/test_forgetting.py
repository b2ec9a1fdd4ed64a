"""Guards against forgetting: exact against plain autograd, resumed bit for bit, refused where they have no meaning."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from planlm.config import TrainConfig
from planlm.corpus.batches import PlanLoader
from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError
from planlm.model import PlanLMForCausalLM
from planlm.training.forgetting import Guards, WithRehearsal, base_model
from planlm.training.objective import Objective
from planlm.training.parallel import Parallel
from planlm.training.train import train

from . import small

TIMES = ("tokens_per_second", "waiting", "memory", "seconds", "seconds_left", "utilisation")


@pytest.fixture(autouse=True)
def _no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes longer than these runs."""
    monkeypatch.setattr("planlm.training.train.matrix_product_rate", lambda *_: 1e9)


def settings(planted: dict[str, str], out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {"steps": 6, "checkpoint_every": 3, "conditioned_layers": 2, "lm_lr": 1e-2, "warmup": 0.0}
    return small.settings(planted, out, **usual | changes)


def lines(out: Path) -> list[dict[str, Any]]:
    found = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


@pytest.mark.parametrize("lora", [None, (2, 4.0)], ids=["full", "lora"])
def test_gradients_are_those_of_the_plain_loss(
    lora: tuple[int, float] | None, planted: dict[str, str], tmp_path: Path
) -> None:
    corpus = PreparedCorpus.load(planted["corpus"])
    model = PlanLMForCausalLM.from_lm(planted["lm"], corpus.codebook, conditioned_layers=2, lora=lora)
    lm_mode = "full" if lora is None else "lora"
    config = settings(planted, tmp_path, kl=0.7, rehearsal=planted["corpus"], rehearsal_weight=0.3, lm_mode=lm_mode)
    base = base_model(model, config)
    plain = PlanLMForCausalLM.from_lm(planted["lm"], corpus.codebook, conditioned_layers=2)
    trained = {name: it for name, it in model.lm.named_parameters() if lora is None or ".lora_" in name}
    model.requires_grad_(False)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.requires_grad_(True).add_(0.05 * torch.randn_like(parameter))
    parallel = Parallel(model)
    objective = Objective(parallel, config, 1, Guards(parallel, config, base))
    model.eval()  # dropout draws per batch
    own, rehearsal = (
        list(islice(PlanLoader(corpus.split(split), window=50, batch_size=3, seed=1, pack=True), 2))
        for split in ("train", "validation")
    )
    metrics = objective.backward(0, list(zip(own, rehearsal, strict=True)))
    gradients = {name: parameter.grad.clone() for name, parameter in trained.items()}
    model.zero_grad()

    expected = torch.zeros(())
    counts = [sum(int((batch.labels >= 0).sum()) for batch in batches) for batches in (own, rehearsal)]
    kl = nll = 0.0
    for number, batch in enumerate([*own, *rehearsal]):
        at = batch.labels >= 0
        arguments = {"position_ids": batch.position_ids, "use_cache": False, "selection": "none"}
        log_q = model(batch.input_ids, **arguments).logits[at].log_softmax(-1)
        with torch.no_grad():
            log_p = plain.eval()(batch.input_ids, **arguments).logits[at].log_softmax(-1)
        divergence = F.kl_div(log_q, log_p, log_target=True, reduction="sum") / sum(counts)
        kl, expected = kl + divergence.item(), expected + 0.7 * divergence
        if number < len(own):
            output = model(batch.input_ids, position_ids=batch.position_ids, plan=batch.plan, use_cache=False)
            expected = expected + F.cross_entropy(output.logits[at], batch.labels[at], reduction="sum") / counts[0]
        else:
            again = F.nll_loss(log_q, batch.labels[at], reduction="sum") / counts[1]
            nll, expected = nll + again.item(), expected + 0.3 * again
    expected.backward()
    assert metrics["kl"] == pytest.approx(kl, rel=1e-5) and kl > 1e-4
    assert metrics["rehearsal_loss"] == pytest.approx(nll, rel=1e-6)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in trained.items():
        error = (gradients[name] - parameter.grad).norm()
        assert error <= 1e-5 * parameter.grad.norm() + 1e-8, name


@pytest.mark.parametrize("lm_mode", ["full", "lora"])
def test_resumed_run_is_the_run_never_stopped(lm_mode: str, planted: dict[str, str], tmp_path: Path) -> None:
    """The base is what --lm gives, and not what training had come to; the rehearsal goes on where it was."""
    changes = {"lm_mode": lm_mode, "kl": 0.5, "rehearsal": planted["corpus"], "accumulate": 2}
    train(settings(planted, tmp_path / "whole", **changes))
    whole = lines(tmp_path / "whole")
    assert abs(whole[0]["kl"]) < 1e-6 < whole[-1]["kl"] and whole[0]["rehearsal_loss"] > 1
    assert whole[1]["loss"] == pytest.approx(
        whole[1]["lm_loss"] + 0.5 * whole[1]["kl"] + whole[1]["rehearsal_loss"], rel=1e-6
    )
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-6")
    shutil.copytree(planted["corpus"], tmp_path / "moved")
    train(settings(planted, tmp_path / "cut", **{**changes, "rehearsal": str(tmp_path / "moved")}, resume=True))
    assert lines(tmp_path / "cut") == whole
    models = [load_file(tmp_path / run / "model/model.safetensors") for run in ("cut", "whole")]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[1])
    with pytest.raises(InputError, match=r"cannot resume with other content than the run began with \(rehearsal"):
        train(settings(planted, tmp_path / "cut", **{**changes, "rehearsal": None}, resume=True))


def test_positions_of_both_corpora_are_stored(planted: dict[str, str]) -> None:
    corpus = PreparedCorpus.load(planted["corpus"])

    def loader() -> WithRehearsal:
        sizes = (("train", 30), ("validation", 2))
        return WithRehearsal(
            *(PlanLoader(corpus.split(name), window=16, batch_size=size, seed=1, pack=True) for name, size in sizes)
        )

    def taken(from_: WithRehearsal, count: int) -> list[list[int]]:
        found: list[list[int]] = []
        while True:
            for own, other in from_:
                found.append([int(own.input_ids.sum()), int(other.input_ids.sum())])
                if len(found) == count:
                    return found
            from_.epoch += 1

    whole = taken(loader(), 60)
    assert len({other for _, other in whole}) > 20, "the second corpus is in another order every time"
    first = loader()
    begun = taken(first, 37)
    second = loader()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + taken(second, 23) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl": 0.1}, r"--kl with --lm-mode freeze: nothing can be forgotten; leave it out"),
        ({"rehearsal": "corpus"}, r"--rehearsal with --lm-mode freeze: nothing can be forgotten"),
        ({"rehearsal": "nowhere", "lm_mode": "full"}, r"nowhere: no prepared corpus"),
        ({"rehearsal_weight": 0.5}, r"--rehearsal-weight is for --rehearsal; set that too"),
        ({"oracle_switch_at": 0.2, "oracle_mix": "1:0"}, r"--oracle-switch-at is for --oracle-schedule switch"),
        ({"oracle_schedule": "switch", "oracle_mix": "0.5"}, r"--oracle-schedule switch goes from RHO to RHO_END"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str, planted: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train(settings(planted, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_rehearsal_without_a_token_to_predict_is_refused(
    planted: dict[str, str], of_one_token: str, tmp_path: Path
) -> None:
    """And not looked through for ever."""
    with pytest.raises(InputError, match=r"^--rehearsal: none of those documents has a second token to predict"):
        train(settings(planted, tmp_path / "run", lm_mode="full", rehearsal=of_one_token))
    assert not (tmp_path / "run").exists()
