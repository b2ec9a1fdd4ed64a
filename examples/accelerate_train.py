"""Several processes by accelerate:

    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_train.py CORPUS LM OUT

Without a GPU the same line starts two processes on the CPU; accelerate's own --cpu needs MPI for more than one.
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from planlm.corpus.collator import PlanCollator
from planlm.corpus.store import PreparedCorpus
from planlm.model import PlanLMForCausalLM

folder, lm, out = sys.argv[1:]
accelerator = Accelerator()
set_seed(0)
corpus = PreparedCorpus.load(folder)
model = PlanLMForCausalLM.from_lm(lm, corpus.codebook, encoder=corpus.manifest.encoder).train()
model.lm.requires_grad_(False)
collator = PlanCollator(corpus.split("train"), window=64)
loader = torch.utils.data.DataLoader(range(len(collator)), batch_size=8, shuffle=True, collate_fn=collator)
optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for number, batch in enumerate(loader, 1):
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    mean = accelerator.reduce(loss.detach(), "mean").item()
    accelerator.print(f"step {number} of {accelerator.num_processes} processes: loss {mean:.4f}")

accelerator.wait_for_everyone()
accelerator.unwrap_model(model).save_pretrained(out, is_main_process=accelerator.is_main_process)
accelerator.end_training()
