"""`benchmarks.gpu`'s way from raw text to a generating model, by the commands that a user types, on a CUDA device.

Texts, encoder and LM are made here, with random words and weights: nothing is downloaded, and nothing learnt that means
anything. What is looked at is that every command does its work there, that a killed run goes on as it would have, and
that a step in a graph is the step without one.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks import harness
from benchmarks.gpu_stages import Result, guarded
from planlm.model.loading import load_model
from planlm.model.tracking import SentenceTracker

DOCUMENTS, SENTENCES, WORDS = 400, 40, 12
"""Of the corpus, of a document and of a sentence."""

STEPS, CHECKPOINT_EVERY = 20, 5

TRAIN = (
    "--lm lm --planner planner --selection soft --lm-mode full --unfreeze-planner-at 0 --window 1024 --batch-size 8 "
    f"--steps {STEPS} --checkpoint-every {CHECKPOINT_EVERY} --log-every 1"
).split()

NEW_TOKENS, PROMPTS = 256, (1, 8)
"""Tokens to generate, and how many texts at a time."""

LIMIT = 300.0
"""Seconds of one command."""


class CommandError(RuntimeError):
    """A command ended with another status than it had to; its last lines."""


def path(folder: Path) -> Result:
    """Every command once, in a folder that is made anew and removed: seconds, and what is compared."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        make_inputs(folder)
        found: Result = {}
        parts: dict[str, Callable[[], Result]] = {
            "prepare": partial(_command, folder, "prepare texts.jsonl --out corpus --actions 256 --encoder encoder "
                               "--tokenizer lm"),
            "pretrain-planner": partial(_command, folder, "pretrain-planner --corpus corpus --out planner --steps 20"),
            "train": partial(_command, folder, "train --corpus corpus --out whole", TRAIN),
            "train, again": partial(_again, folder),
            "train, killed": partial(_killed, folder),
            "train --graph never": partial(_otherwise, folder, "--graph never"),
            "train --compile": partial(_otherwise, folder, "--compile"),
            "evaluate": partial(_command, folder, "evaluate whole --corpus corpus --max-documents 10 "
                                "--plans none,fixed,hard,soft"),
            "generate": partial(_command, folder, "generate whole --prompt Words. --max-new-tokens 64 --json"),
            "generation": partial(generation, folder / "whole"),
        }  # fmt: skip
        for part, run in parts.items():
            found[part] = guarded(run)
            harness.note(f"{part}: {json.dumps(found[part])[:300]}")
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_inputs(folder: Path) -> None:
    """Texts of invented words, a sentence encoder of MiniLM's size and a GPT-2-small, with random weights."""
    source = random.Random(0)
    letters = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 9))) for _ in range(5000)]
    weights = list(itertools.accumulate(1 / (rank + 5) for rank in range(len(letters))))

    def sentence() -> str:
        words = source.choices(letters, cum_weights=weights, k=source.randint(WORDS // 2, 2 * WORDS))
        return " ".join(words).capitalize() + "."

    texts = [" ".join(sentence() for _ in range(SENTENCES)) for _ in range(DOCUMENTS)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    special = {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>", "model_max_length": 512}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    torch.manual_seed(0)
    size = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    encoder = BertModel(BertConfig(vocab_size=len(tokenizer), **size))
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=50304, **ids))
    for name, model in (("encoder", encoder), ("lm", lm)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _command(folder: Path, text: str, more: Sequence[str] = ()) -> Result:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "planlm", *text.split(), *more], cwd=folder, capture_output=True, text=True,
        timeout=LIMIT,
    )  # fmt: skip
    if done.returncode:
        raise CommandError(f"status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    return {"seconds": time.monotonic() - begin, "end of output": (done.stdout + done.stderr)[-600:]}


def _again(folder: Path) -> Result:
    """Twice the same: what a resumed run could be equal to."""
    return _command(folder, "train --corpus corpus --out again", TRAIN) | compared(folder / "whole", folder / "again")


def _killed(folder: Path) -> Result:
    """Killed behind a checkpoint in the middle, and resumed."""
    words = ["train", "--corpus", "corpus", "--out", "killed", *TRAIN]
    process = subprocess.Popen(
        [sys.executable, "-m", "planlm", *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    awaited = folder / "killed" / "checkpoints" / f"step-{2 * CHECKPOINT_EVERY}"
    begin = time.monotonic()
    while not awaited.is_dir() and process.poll() is None and time.monotonic() - begin < LIMIT:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not awaited.is_dir():
        raise CommandError("it ended before its second checkpoint")
    resumed = _command(folder, "train --corpus corpus --out killed --resume", TRAIN)
    return resumed | compared(folder / "whole", folder / "killed")


def _otherwise(folder: Path, options: str) -> Result:
    """A run with other options, which rounds otherwise or draws the planner's dropout for batches of other shapes."""
    out = options.replace("--", "").replace(" ", "-")
    done = _command(folder, f"train --corpus corpus --out {out}", [*TRAIN, *options.split()])
    return done | compared(folder / "whole", folder / out, within=0.05)


def compared(run: Path, other: Path, within: float = 1e-2) -> Result:
    """How far two runs are apart: losses step by step, and weights at the end. Flash attention adds in any order."""
    losses, others = ([line["loss"] for line in _log(each)] for each in (run, other))
    first, second = (load_file(each / "model" / "model.safetensors") for each in (run, other))
    differences = [float((first[name].float() - second[name].float()).abs().max()) for name in first]
    apart = max(abs(a - b) for a, b in zip(losses, others, strict=True))
    return {
        "first and last loss": [losses[0], losses[-1], others[0], others[-1]],
        "largest difference of losses": apart,
        "largest difference of weights": max(differences),
        **({} if apart <= within else {"error": f"losses of the two runs differ by {apart:.2g}, at most {within:g}"}),
    }


def _log(run: Path) -> Iterator[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (line for line in lines if "loss" in line and "step" in line)


def generation(run: Path) -> Result:
    """Greedy tokens a second of texts side by side, with plans and without."""
    model = load_model(str(run))
    ids = model.tokenizer("Words and words. More of them.", return_tensors="pt").input_ids
    found: Result = {}
    for number, selection in itertools.product(PROMPTS, ("none", "soft")):
        prompt = ids.expand(number, -1).to(model.device)

        def generate(prompt: torch.Tensor = prompt, selection: str = selection) -> int:
            tracker = SentenceTracker(model.tokenizer, model.encoder, [])
            with torch.no_grad():
                whole = model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), tracker=tracker, selection=selection,
                    max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
                )  # fmt: skip
            return int(whole[:, prompt.shape[1] :].numel())

        generate()
        rates = []
        for _ in range(3):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            made = generate()
            torch.cuda.synchronize()
            rates.append(made / (time.perf_counter() - begin))
        found[f"{number} texts, {selection}"] = {"tokens/s": statistics.median(rates)}
    return found
