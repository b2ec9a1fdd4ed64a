"""A text piece by piece while it is written, then its plan: python examples/stream.py RUN/model "The harbour was" """

import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoModelForCausalLM, TextIteratorStreamer

import planlm  # noqa: F401  (transformers knows the model from here on)
from planlm.model.tracking import SentenceTracker
from planlm.text.alignment import prompt_ids

folder, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
ids = torch.tensor([prompt_ids(model.tokenizer, prompt)])  # as a corpus has them: no end token behind the prompt
tracker = SentenceTracker(model.tokenizer, model.encoder)
streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True)
settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": True}

with ThreadPoolExecutor() as pool:  # the model writes in a thread, this one reads
    written = pool.submit(model.generate, ids, tracker=tracker, streamer=streamer, **settings)
    print(prompt, end="", flush=True)
    for piece in streamer:
        print(piece, end="", flush=True)
    print()

text = tracker.track(written.result()[0].tolist())
for before in text.finished[tracker.track(ids[0].tolist()).segments[-1] :]:
    if before.logits is not None:  # the planner's, as they were used for the sentence behind this one
        print(f"behind {before.text!r}: action {int(before.logits.argmax())}")
