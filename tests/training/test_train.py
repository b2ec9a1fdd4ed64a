"""Joint training on a planted corpus: it is learnt, runs repeat and resume bit for bit, mistakes are named."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from planlm.config import EvaluateConfig, PlannerConfig, TrainConfig
from planlm.corpus.batches import PlanLoader
from planlm.corpus.labels import read_labels
from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError
from planlm.evaluation.evaluate import evaluate
from planlm.kernels import environment
from planlm.model import PlanLMForCausalLM
from planlm.model.planner import Planner
from planlm.training.groups import trainable_groups
from planlm.training.objective import Objective
from planlm.training.parallel import Parallel
from planlm.training.pretrain_planner import pretrain_planner
from planlm.training.run_directory import Run
from planlm.training.train import train


@pytest.fixture(scope="session")
def planner(planted: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = tmp_path_factory.mktemp("planner") / "run"
    return pretrain_planner(
        PlannerConfig(corpus=planted["corpus"], out=str(run), steps=150, batch_size=16, lr=3e-3, heads=4, dropout=0.0)
    )


def settings(planted: dict[str, str], out: Path, **changes: Any) -> TrainConfig:
    values = {
        "corpus": planted["corpus"], "lm": planted["lm"], "out": str(out), "steps": 6, "batch_size": 4, "window": 16,
        "conditioned_layers": 2, "precision": "fp32", "log_every": 1, "checkpoint_every": 3, "planner_lr": 1e-3,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]


def test_planted_order_is_learnt(planted: dict[str, str], planner: dict[str, Any], tmp_path: Path) -> None:
    """The planner sees the whole order, the LM's window of 16 tokens less than four sentences of it."""
    assert planner["accuracy@1"] > 0.95
    rows = {}
    for selection in ("soft", "fixed"):
        out = tmp_path / selection
        train(
            settings(
                planted, out, selection=selection, planner=planner["run"], lm_mode="full", lm_lr=3e-3, lr=3e-3,
                steps=150, batch_size=16, window=8, log_every=50, checkpoint_every=1000,
            )
        )  # fmt: skip
        result = evaluate(
            EvaluateConfig(run=str(out), corpus=planted["corpus"], plans=selection, window=8, versus=selection)
        )
        rows[selection] = result["rows"][0]["perplexity"]
    assert rows["soft"] < 0.9 * rows["fixed"], rows


def test_same_command_gives_same_losses_and_weights(
    planted: dict[str, str], planner: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        train(settings(planted, tmp_path / name, planner=planner["run"], oracle_mix="0.5:0", selection="gumbel"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("a", "b"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("stop_at", [1, 3, 4, 5])
def test_resumed_run_is_the_run_never_stopped(
    stop_at: int, planted: dict[str, str], planner: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Die before step `stop_at`, then resume: every logged loss and every weight is the uninterrupted run's."""
    config = {"planner": planner["run"], "oracle_mix": "0.3", "unfreeze_planner_at": 0.6, "checkpoint_every": 2}
    train(settings(planted, tmp_path / "whole", **config))
    backward = Objective.backward

    def dying(self: Objective, step: int, batches: list[Any]) -> dict[str, float]:
        if step == stop_at:
            raise RuntimeError("killed")
        return backward(self, step, batches)

    monkeypatch.setattr(Objective, "backward", dying)
    with pytest.raises(RuntimeError, match="killed"):
        train(settings(planted, tmp_path / "cut", **config))
    monkeypatch.undo()
    train(settings(planted, tmp_path / "cut", **config, resume=True))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_micro_batches_equal_one_big_batch(planted: dict[str, str], tmp_path: Path) -> None:
    """Gradients, since Adam would hide a wrong scale, of micro-batches with unequal numbers of labels."""
    corpus = PreparedCorpus.load(planted["corpus"])
    model = PlanLMForCausalLM.from_lm(planted["lm"], corpus.codebook, conditioned_layers=2)
    torch.nn.init.normal_(model.adapter.weight)
    objective = Objective(Parallel(model), settings(planted, tmp_path, planner_loss=0.5), steps=1)
    model.eval()  # dropout draws per batch
    losses, gradients = [], []
    for batch_size in (8, 2):
        loader = PlanLoader(corpus.split("train"), window=50, batch_size=batch_size)
        batches = list(islice(loader, 8 // batch_size))
        assert batch_size == 8 or len({int((batch.labels != -100).sum()) for batch in batches}) > 1
        losses.append(objective.backward(0, batches)["loss"])
        trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        gradients.append({name: gradient.clone() for name, gradient in trained.items()})
        model.zero_grad()
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        error = (gradients[1][name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error < 1e-5 or expected.norm() < 1e-9, f"{name}: {error}"


def test_dropout_is_where_weights_train_alone(planted: dict[str, str], tmp_path: Path) -> None:
    """A planner that is frozen, or has not joined yet, plans as it does in evaluation."""
    corpus = PreparedCorpus.load(planted["corpus"])
    model = PlanLMForCausalLM.from_lm(
        planted["lm"], corpus.codebook, planner=Planner.of_codebook(corpus.codebook, dropout=0.5), conditioned_layers=2
    )
    torch.nn.init.normal_(model.adapter.weight)
    model.requires_grad_(False)
    model.adapter.requires_grad_(True)
    objective = Objective(Parallel(model), settings(planted, tmp_path), steps=9)
    batches = list(islice(PlanLoader(corpus.split("train"), window=16, batch_size=4), 1))
    first, second = (objective.backward(0, batches)["loss"] for _ in range(2))
    assert first == second
    model.planner.requires_grad_(True)
    third, fourth = (objective.backward(0, batches)["loss"] for _ in range(2))
    assert len({first, third, fourth}) == 3
    model.eval()
    assert objective.backward(0, batches)["loss"] == first


def test_what_is_logged_alone_costs_nothing_between_log_lines(planted: dict[str, str], tmp_path: Path) -> None:
    corpus = PreparedCorpus.load(planted["corpus"])
    model = PlanLMForCausalLM.from_lm(planted["lm"], corpus.codebook, conditioned_layers=2)
    config = settings(planted, tmp_path, planner_loss=0.5, log_every=4)
    objective = Objective(Parallel(model), config, steps=9)
    model.eval()
    batches = list(islice(PlanLoader(corpus.split("train"), window=16, batch_size=4), 1))
    logged, between = objective.backward(3, batches), objective.backward(4, batches)
    assert between.keys() == logged.keys() - {"planner_loss", "planner_accuracy", "planner_entropy"}
    assert all(between[name] == logged[name] for name in between)
    assert 0 <= logged["planner_accuracy"] <= 1 and logged["planner_entropy"] > 0


def test_the_model_has_the_labels_of_its_corpus(planted: dict[str, str], tmp_path: Path) -> None:
    train(settings(planted, tmp_path / "run", steps=1))
    corpus = PreparedCorpus.load(planted["corpus"])
    labels = read_labels(corpus.path, corpus.manifest.num_actions)
    assert labels and AutoConfig.from_pretrained(tmp_path / "run" / "model").action_labels == labels


def test_frozen_lm_is_untouched_and_full_is_not(
    planted: dict[str, str], planner: dict[str, Any], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(planted["lm"], dtype=torch.float32).state_dict()
    for mode in ("freeze", "full"):
        train(settings(planted, tmp_path / mode, planner=planner["run"], lm_mode=mode))
        trained = load_file(tmp_path / mode / "model" / "model.safetensors")
        same = [torch.equal(base[name[3:]], value) for name, value in trained.items() if name.startswith("lm.")]
        assert all(same) if mode == "freeze" else not any(same)
        assert trained["adapter.weight"].abs().sum() > 0


def test_lora_trains_its_own_and_leaves_a_plain_model(
    planted: dict[str, str], planner: dict[str, Any], tmp_path: Path
) -> None:
    config = {"planner": planner["run"], "lm_mode": "lora", "lora_rank": 2, "lm_lr": 1e-2}
    train(settings(planted, tmp_path / "whole", **config))
    stored = load_file(tmp_path / "whole" / "checkpoints" / "step-6" / "tensors.safetensors")
    names = {name for name in stored if name.startswith("model/lm.")}
    assert names and all(".lora_" in name for name in names), "of the LM only the additions are stored"
    base = AutoModelForCausalLM.from_pretrained(planted["lm"], dtype=torch.float32).state_dict()
    trained = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    matrices = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    for name, value in trained.items():
        if name.startswith("lm."):
            changes = name.endswith(".weight") and any(f".{matrix}." in name for matrix in matrices)
            assert torch.equal(base[name[3:]], value) is not changes, name
    _, loading = PlanLMForCausalLM.from_pretrained(tmp_path / "whole" / "model", output_loading_info=True)
    assert not any(loading.values()), loading
    train(settings(planted, tmp_path / "cut", **config))
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-6")
    train(settings(planted, tmp_path / "cut", **config, resume=True))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    again = load_file(tmp_path / "cut" / "model" / "model.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in again.items())


@pytest.mark.parametrize("lm_mode", ["freeze", "lora", "full"])
def test_activations_computed_again_are_the_same(
    lm_mode: str, planted: dict[str, str], planner: dict[str, Any], tmp_path: Path
) -> None:
    runs = []
    for again in (False, True):
        out = tmp_path / str(again)
        changes = {"planner": planner["run"], "lm_mode": lm_mode, "accumulate": 2, "checkpoint_activations": again}
        train(settings(planted, out, unfreeze_planner_at=0.0, **changes))
        runs.append((losses(out), load_file(out / "model" / "model.safetensors")))
    assert runs[0][0] == runs[1][0]
    for name, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], value, rtol=1e-6, atol=1e-8)


@pytest.mark.skipif(environment.compiler_program(default="g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_run_has_the_losses_of_the_plain_one(
    planted: dict[str, str], planner: dict[str, Any], tmp_path: Path
) -> None:
    for compiled in (False, True):
        changes = {"planner": planner["run"], "lm_mode": "full", "compile": compiled}
        train(settings(planted, tmp_path / str(compiled), unfreeze_planner_at=0.5, **changes))
    plain, fast = (dict(losses(tmp_path / name)) for name in ("False", "True"))
    assert fast == pytest.approx(plain, rel=1e-5)
    names = [load_file(tmp_path / name / "model" / "model.safetensors").keys() for name in ("False", "True")]
    assert names[0] == names[1]


def test_gradients_are_computed_for_what_trains_only(planted: dict[str, str], tmp_path: Path) -> None:
    corpus = PreparedCorpus.load(planted["corpus"])
    model = PlanLMForCausalLM.from_lm(planted["lm"], corpus.codebook)
    config = settings(planted, tmp_path, unfreeze_planner_at=0.5)
    groups = {group.name: group for group in trainable_groups(model, config, steps=10)}
    assert {name: group.start for name, group in groups.items()} == {
        "adapter": 0,
        "bias": 0,
        "codebook": 0,
        "planner": 5,
    }
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(name.startswith("lm.") for group in groups.values() for name in group.parameters)


def test_planner_joins_at_its_fraction(planted: dict[str, str], planner: dict[str, Any], tmp_path: Path) -> None:
    config = {"planner": planner["run"], "steps": 10, "checkpoint_every": 1, "keep_checkpoints": 20}
    train(settings(planted, tmp_path / "run", unfreeze_planner_at=0.4, unfreeze_codebook_at=0.7, **config))
    weights = [
        load_file(tmp_path / "run" / "checkpoints" / f"step-{step}" / "tensors.safetensors") for step in range(1, 11)
    ]

    def first_change(name: str) -> int:
        return next(at for at in range(1, 10) if not torch.equal(weights[at][name], weights[at - 1][name]))

    assert (
        first_change("model/planner.head.weight") == 4
    )  # the fifth step, 0-based 4 = 0.4 * 10, is the first that moves it
    assert first_change("model/adapter.codebook") == 7
    assert first_change("model/adapter.weight") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": "none"}, "--selection none with --lm-mode freeze trains nothing"),
        ({"selection": "top-k"}, "--selection top-k needs --top-k"),
        (
            {"temperature": 0.0, "batch_size": 0},
            "--batch-size 0: expected at least 1; --temperature 0.0: expected 1e-30 to 1e\\+30",
        ),
        ({"selection": "oracle", "oracle_mix": "0.5"}, "--oracle-mix has no meaning with --selection oracle"),
        ({"corpus": "nowhere"}, "nowhere: no prepared corpus"),
        ({"lm": "nowhere/at/all"}, "nowhere/at/all: no such folder"),
        ({"planner": "nowhere"}, "nowhere.*planner: no planner here"),
        ({"epochs": 0.0}, "--epochs 0.0: expected more than 0"),
        ({"loss_kernel": "liger"}, "--loss-kernel liger: needs CUDA, and this is cpu; choose chunked"),
        ({"window": 65}, "--window 65: the context of .* is 64 tokens"),
        ({"selection": "top-k", "top_k": 5}, "--top-k 5: .* has 4 actions"),
    ],
)
def test_mistakes_are_named_in_one_line(
    changes: dict[str, Any], message: str, planted: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        train(settings(planted, tmp_path / "run", **changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists(), "nothing is written before the input is known to be sound"


@pytest.mark.parametrize("compiler", ["no-such-compiler", "", "'g++"])
def test_compile_without_a_compiler_is_refused(
    compiler: str, planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(
        InputError, match=r"--compile needs a C\+\+ compiler: install g\+\+, or name one in the variable CXX"
    ):
        train(settings(planted, tmp_path / "run", compile=True))


def test_corpus_of_another_tokenizer_is_refused(planted: dict[str, str], tmp_path: Path, lm_folder: Any) -> None:
    with pytest.raises(
        InputError, match=r"prepared with the tokenizer of .* which is not that of .*prepare a corpus with"
    ):
        train(settings(planted, tmp_path / "run", lm=lm_folder("gpt2")))


def test_run_directory_in_use_is_refused(planted: dict[str, str], tmp_path: Path) -> None:
    train(settings(planted, tmp_path / "run", steps=1))
    with pytest.raises(InputError, match="holds a run already; continue it with --resume"):
        train(settings(planted, tmp_path / "run", steps=1))
    with pytest.raises(InputError, match=r"cannot resume with other settings .lr was 0.001, now 0.5"):
        train(settings(planted, tmp_path / "run", steps=1, lr=0.5, resume=True))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        train(settings(planted, tmp_path / "other"))


def test_a_torn_log_loses_its_torn_lines_alone(planted: dict[str, str], tmp_path: Path) -> None:
    run = Run(settings(planted, tmp_path / "run"))
    for step in (1, 2, 3):
        run.log({"step": step})
    with run.metrics.open("ab") as file:
        file.write(b'12\n[1]\n{"step": 2, "lo\n\0\0\xff\xfe')
    run.forget_after(2)
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_log_lines_are_json_whatever_the_loss(planted: dict[str, str], tmp_path: Path) -> None:
    run = Run(settings(planted, tmp_path / "run"))
    run.log({"step": 1, "loss": float("nan"), "grad_norm": {"lm": float("inf"), "planner": 2.0}})
    assert run.metrics.read_text() == '{"step": 1, "loss": null, "grad_norm": {"lm": null, "planner": 2.0}}\n'


def test_a_run_may_be_moved_and_its_log_lost(planted: dict[str, str], tmp_path: Path) -> None:
    train(settings(planted, tmp_path / "run", steps=1))
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "moved" / "metrics.jsonl").unlink()
    result = train(settings(planted, tmp_path / "moved", steps=1, resume=True))
    assert result["run"] == str(tmp_path / "moved") and "loss" not in result


def test_damaged_configuration_is_named_and_a_torn_one_is_no_run(planted: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / ".planlm-0123456789ab.partial").touch()  # the process died before the rename
    finished = train(settings(planted, tmp_path / "torn", steps=1))
    assert train(settings(planted, tmp_path / "torn", steps=1, resume=True)) == finished, "figures survive a resume"
    (tmp_path / "torn" / "config.yaml").write_text("")
    with pytest.raises(InputError, match=r"config.yaml: damaged"):
        train(settings(planted, tmp_path / "torn", steps=1, resume=True))


def test_model_folder_is_whole_or_absent(
    planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, *_: Any, **__: Any) -> None:
        (Path(_[0]) / "config.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("planlm.model.modeling.PlanLMForCausalLM.save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        train(settings(planted, tmp_path / "run", steps=1))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert "model" not in left and not any(name.endswith(".partial") for name in left)
    monkeypatch.undo()
    train(settings(planted, tmp_path / "run", steps=1, resume=True))
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_shuffled_plans_and_a_short_window_are_trained_and_evaluated(
    planted: dict[str, str], planner: dict[str, Any], tmp_path: Path
) -> None:
    """The planner, which its own loss alone trains, stays as good as it was on its own documents."""
    config = settings(planted, tmp_path / "run", selection="shuffled", attention_window=3, planner=planner["run"],
                      planner_loss=1.0, unfreeze_planner_at=0.0)  # fmt: skip
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["planner_accuracy"] > 0.9 and lines[-1]["grad_norm"]["planner"] > 0
    result = evaluate(
        EvaluateConfig(run=str(tmp_path / "run"), corpus=planted["corpus"], plans="soft,shuffled,none", window=16)
    )
    assert len({row["nll"] for row in result["rows"]}) == 3
    assert PlanLMForCausalLM.from_pretrained(tmp_path / "run" / "model").config.attention_window == 3
    with pytest.raises(InputError, match="--oracle-mix has no meaning with --selection shuffled"):
        train(settings(planted, tmp_path / "other", selection="shuffled", oracle_mix="0.5"))


def test_planner_of_another_corpus_is_refused(planted: dict[str, str], tmp_path: Path) -> None:
    from planlm.model import Planner

    Planner(32, 9, heads=1).save(tmp_path / "wrong" / "planner")
    with pytest.raises(InputError, match="the planner was trained on other actions"):
        train(settings(planted, tmp_path / "run", planner=str(tmp_path / "wrong")))
