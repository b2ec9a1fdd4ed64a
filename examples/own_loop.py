"""A training loop of one's own in plain PyTorch: python examples/own_loop.py CORPUS LM OUT

CORPUS is made by `planlm prepare` with the tokenizer of LM; OUT becomes a model folder for `from_pretrained`.
"""

import sys

import torch

from planlm.corpus.batches import PlanLoader
from planlm.corpus.store import PreparedCorpus
from planlm.model import PlanLMForCausalLM

EPOCHS, LR, PLANNER_LOSS = 2, 1e-3, 0.1

folder, lm, out = sys.argv[1:]
corpus = PreparedCorpus.load(folder)
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = PlanLMForCausalLM.from_lm(lm, corpus.codebook, encoder=corpus.manifest.encoder).to(device).train()
model.lm.requires_grad_(False)  # planner, codebook and adapter train; without this line the LM too
optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=LR)
loader = PlanLoader(corpus.split("train"), window=64, batch_size=8, pack=True)

for epoch in range(EPOCHS):
    loader.epoch, total, tokens = epoch, 0.0, 0
    for batch in loader:
        batch = batch.to(device)
        output = model(batch.input_ids, **batch.layout, shift_labels=batch.labels, plan=batch.plan)
        (output.loss + PLANNER_LOSS * output.oracle_nll.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total, tokens = total + output.nll_sum.item(), tokens + int((batch.labels != -100).sum())
    print(f"epoch {epoch + 1}: {total / tokens:.4f} nats a token")

model.save_pretrained(out)
