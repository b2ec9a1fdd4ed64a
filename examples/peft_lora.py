"""LoRA by peft, planner and adapter trained whole beside it: python examples/peft_lora.py CORPUS LM OUT

OUT holds peft's adapter; OUT/merged the joint model with it, for `from_pretrained`.
"""

import sys
from pathlib import Path

import peft
import torch

from planlm.corpus.batches import PlanLoader
from planlm.corpus.store import PreparedCorpus
from planlm.model import PlanLMForCausalLM

folder, lm, out = sys.argv[1:]
corpus = PreparedCorpus.load(folder)
torch.manual_seed(0)
joint = PlanLMForCausalLM.from_lm(lm, corpus.codebook, encoder=corpus.manifest.encoder)
settings = peft.LoraConfig(
    r=8, target_modules="all-linear", modules_to_save=["planner", "adapter"], task_type="CAUSAL_LM"
)
model = peft.get_peft_model(joint, settings).train()
model.print_trainable_parameters()
optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)

for number, batch in enumerate(PlanLoader(corpus.split("train"), window=64, batch_size=8, pack=True), 1):
    output = model(input_ids=batch.input_ids, **batch.layout, shift_labels=batch.labels, plan=batch.plan)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {number}: loss {output.loss.item():.4f}")

model.save_pretrained(out)
model.merge_and_unload().save_pretrained(Path(out) / "merged")
