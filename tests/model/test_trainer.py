"""The joint model in transformers' Trainer: batches, checkpoints, and where its plan inputs come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from planlm.model import PlanLMForCausalLM
from planlm.plan_inputs import PlanInputs
from tests.model.conftest import TEXTS, A, joint, logits, tokens


class Rows(torch.utils.data.Dataset):
    """Texts of unlike lengths as padded rows."""

    def __init__(self, model: PlanLMForCausalLM) -> None:
        encoded = [tokens(model, text)[0] for text in TEXTS * 2]
        width = max(map(len, encoded))
        self.rows = [
            {
                "input_ids": nn.functional.pad(ids, (0, width - len(ids))),
                "attention_mask": nn.functional.pad(torch.ones_like(ids), (0, width - len(ids))),
                "labels": nn.functional.pad(ids, (0, width - len(ids)), value=-100),
            }
            for ids in encoded
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return self.rows[row]


def trainer(model: PlanLMForCausalLM, folder: Path, **arguments: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "save_strategy": "no",
    }  # fmt: skip
    rows = Rows(model)
    return Trainer(model=model, args=TrainingArguments(**(settings | arguments)), train_dataset=rows, eval_dataset=rows)


def test_accumulated_micro_batches_are_one_batch(
    lm_folder: Callable[[str], str], encoder: object, tmp_path: Path
) -> None:
    logged = []
    for batch_size, accumulated in ((8, 1), (2, 4), (1, 8)):
        trained = trainer(
            joint(lm_folder("llama"), encoder), tmp_path, per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulated, max_steps=1, learning_rate=0.0, max_grad_norm=1e9,
        )  # fmt: skip
        trained.train()
        logged.append([trained.state.log_history[0][name] for name in ("loss", "grad_norm")])
    torch.testing.assert_close(torch.tensor(logged[1:]), torch.tensor(logged[:1] * 2), rtol=1e-4, atol=1e-4)


def test_trainer_evaluates_and_predicts(model: PlanLMForCausalLM, tmp_path: Path) -> None:
    evaluator = trainer(model, tmp_path)
    rows = torch.utils.data.default_collate(list(evaluator.eval_dataset))
    expected = [model(**{name: value[at : at + 4] for name, value in rows.items()}).loss.item() for at in (0, 4)]
    assert evaluator.evaluate()["eval_loss"] == pytest.approx(sum(expected) / 2, rel=1e-5)
    predicted = evaluator.predict(evaluator.eval_dataset).predictions
    expected_logits = logits(model, rows["input_ids"], attention_mask=rows["attention_mask"])
    torch.testing.assert_close(torch.from_numpy(predicted), expected_logits, rtol=1e-4, atol=1e-5)


def test_trainer_ends_with_the_best_checkpoint(gpt2: PlanLMForCausalLM, tmp_path: Path) -> None:
    best = trainer(
        gpt2, tmp_path, max_steps=3, learning_rate=0.5, lr_scheduler_type="constant", eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    best.train()
    losses = [entry["eval_loss"] for entry in best.state.log_history if "eval_loss" in entry]
    assert len(losses) == 3 and best.state.best_metric == min(losses)
    assert losses[-1] != min(losses), "the last step must not be the best one for this test to say anything"
    assert best.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_trainer_takes_plan_inputs_from_a_collator(gpt2: PlanLMForCausalLM, tmp_path: Path, whole: bool) -> None:
    """As one `PlanInputs`, or as tensors by name."""
    plan = PlanInputs(torch.zeros(4, 9, dtype=torch.long), torch.tensor([[0, 1]]), torch.randn(1, 2, A))
    given: dict[str, Any] = {"plan": plan} if whole else {k: v for k, v in vars(plan).items() if torch.is_tensor(v)}
    ids = torch.randint(300, (4, 9))
    evaluator = Trainer(
        model=gpt2, data_collator=lambda rows: {"input_ids": ids, "labels": ids, **given}, eval_dataset=Rows(gpt2),
        args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=8),
    )  # fmt: skip
    loss = evaluator.evaluate()["eval_loss"]
    assert loss == pytest.approx(gpt2(ids, labels=ids, plan=plan).loss.item(), rel=1e-5)
    assert loss != pytest.approx(gpt2(ids, labels=ids).loss.item(), rel=1e-5)


def test_trainer_keeps_the_columns_that_are_plan_inputs(gpt2: PlanLMForCausalLM, tmp_path: Path) -> None:
    """With its default `remove_unused_columns` it drops what `forward`'s signature has no name for."""
    ids = torch.randint(300, (4, 9))
    rows = [{"input_ids": row, "segment_ids": torch.zeros(9, dtype=torch.long)} for row in ids]
    shared = {"segment_rows": torch.tensor([[0, 1]]), "sentence_embeddings": torch.randn(1, 2, A)}

    def collate(columns: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {name: torch.stack([row[name] for row in columns]) for name in columns[0]}
        return {**batch, "labels": batch["input_ids"], **shared}

    evaluator = Trainer(
        model=gpt2, data_collator=collate, eval_dataset=rows,  # type: ignore[arg-type]
        args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=4),
    )  # fmt: skip
    expected = gpt2(ids, labels=ids, segment_ids=torch.zeros(4, 9, dtype=torch.long), **shared).loss.item()
    assert evaluator.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_plan_inputs_that_are_none_are_not_given(gpt2: PlanLMForCausalLM) -> None:
    ids = torch.randint(300, (2, 9))
    nothing = dict.fromkeys(PlanInputs.__dataclass_fields__)
    for options in ({}, {"selection": "none"}):
        assert torch.equal(gpt2(ids, **nothing, **options).logits, gpt2(ids, **options).logits)
