"""Joint training by transformers' Trainer: python examples/trainer.py CORPUS LM OUT

The collator makes windows of a prepared corpus; a callback lets the planner join after a part of training, as
`planlm train --unfreeze-planner-at` does.
"""

import sys
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from planlm.corpus.collator import PlanCollator
from planlm.corpus.store import PreparedCorpus
from planlm.model import PlanLMForCausalLM


class UnfreezePlanner(TrainerCallback):
    """Keeps the planner as it is until a fraction of the steps is done."""

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        model.planner.requires_grad_(state.global_step >= self.fraction * state.max_steps)


folder, lm, out = sys.argv[1:]
corpus = PreparedCorpus.load(folder)
model = PlanLMForCausalLM.from_lm(lm, corpus.codebook, encoder=corpus.manifest.encoder)
model.lm.requires_grad_(False)
collator = PlanCollator(corpus.split("train"), window=64)
arguments = TrainingArguments(
    out, per_device_train_batch_size=8, learning_rate=1e-3, num_train_epochs=1, logging_steps=5, report_to=[]
)
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=range(len(collator)),
    data_collator=collator,
    callbacks=[UnfreezePlanner(0.4)],
)
trainer.train()
trainer.save_model(out)
