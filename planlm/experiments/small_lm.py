"""A small LM, trained in minutes on one's own text: tokenizer, GPT-2, and a corpus in its tokens.

Sizes: B windows, W positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from planlm.config import SmallLMConfig
from planlm.corpus.labels import read_labels, write_labels
from planlm.corpus.store import MANIFEST, CorpusWriter, PreparedCorpus
from planlm.errors import InputError
from planlm.files import replacing_folder
from planlm.precision import autocast, device
from planlm.pretrained.tokenizer import load_tokenizer, tokenizer_fingerprint
from planlm.progress import track
from planlm.text.alignment import start_tokens, tokenize

END = "<|endoftext|>"


def pretrain_lm(texts: Iterable[str], out: Path, shape: SmallLMConfig) -> Path:
    """Train a byte-level BPE tokenizer and a GPT-2 on `texts`, and write both to the folder `out`, whole or not at all.

    Args:
        texts: documents; of very many the first, as many as the steps take.
        out: folder; left as it is where it exists.
        shape: of the LM and its training.

    Raises:
        InputError: the width is not heads of 64 channels, or the text is less than a window.
    """
    if out.is_dir():
        return out
    if shape.width % 64 or shape.window > shape.context:
        raise InputError(
            f"width {shape.width}, window {shape.window}, context {shape.context}: expected a multiple of 64, and a "
            "window within the context"
        )
    texts = _enough(texts, 5 * shape.steps * shape.batch_size * shape.window)
    tokenizer = _train_tokenizer(texts, shape.vocabulary)
    windows = _windows(tokenizer, texts, shape.window)
    torch.manual_seed(shape.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocabulary, n_positions=shape.context, n_embd=shape.width, n_layer=shape.layers,
            n_head=shape.width // 64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    ).to(device())  # fmt: skip
    _fit(model, windows, shape)
    with replacing_folder(out) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    return out


def _enough(texts: Iterable[str], characters: int) -> list[str]:
    """The first texts that have so many characters together; a token has fewer than five."""
    taken: list[str] = []
    length = 0
    for text in texts:
        if length >= characters:
            break
        taken.append(text)
        length += len(text)
    return taken


def _train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def _windows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], window: int) -> Tensor:
    """All texts, an end token after each, as sequences of `window + 1` tokens that overlap by one."""
    stream = [token for ids in tokenizer(list(texts))["input_ids"] for token in (*ids, 0)]
    num_windows = (len(stream) - 1) // window
    if num_windows < 1:
        raise InputError(f"{len(stream)} tokens of text are less than a window of {window} to train an LM on")
    return torch.tensor(stream[: num_windows * window + 1]).unfold(0, window + 1, window)  # [windows, W + 1]


def _fit(model: GPT2LMHeadModel, windows: Tensor, shape: SmallLMConfig) -> None:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=shape.lr, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.04 * shape.steps), 1 - step / shape.steps)
    )
    generator = torch.Generator().manual_seed(shape.seed)
    epochs = math.ceil(shape.steps * shape.batch_size / len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(epochs)])
    model.train()
    for step in track(range(shape.steps), "pre-train the small LM", shape.steps):
        chosen = order[step * shape.batch_size : (step + 1) * shape.batch_size]
        batch = windows[chosen].to(model.device)  # [B, W + 1]
        with autocast("auto", model.device):
            logits = model(batch[:, :-1], use_cache=False).logits  # [B, W, V]
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


def retokenize(corpus: PreparedCorpus, tokenizer_name: str, out: Path) -> PreparedCorpus:
    """The same documents, sentences, embeddings and actions in another LM's tokens, as a prepared corpus in `out`.

    What takes long in preparation, embedding the sentences, does not depend on the LM.
    """
    if (out / MANIFEST).is_file():
        return PreparedCorpus.load(out)
    tokenizer = load_tokenizer(tokenizer_name)
    writer = CorpusWriter(out, corpus.codebook.numpy())
    for name in (name for name, counts in corpus.manifest.splits.items() if counts["documents"]):
        for number, table in enumerate(corpus.split(name).with_format("arrow").iter(1000)):
            documents = zip(table["text"].to_pylist(), table["sentence_spans"].to_pylist(), strict=True)
            columns = zip(*(tokenize(tokenizer, text, spans) for text, spans in documents), strict=True)
            for column, values in zip(("input_ids", "sentence_tokens"), columns, strict=True):
                at = table.schema.get_field_index(column)
                table = table.set_column(at, writer.schema.field(at), pa.array(values, writer.schema.field(at).type))
            writer.add(name, number, table)
    manifest = dataclasses.replace(
        corpus.manifest,
        tokenizer=tokenizer_name,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        vocabulary=len(tokenizer),
        has_start_token=bool(start_tokens(tokenizer)),
    )
    writer.finish(manifest)
    if (labels := read_labels(corpus.path, corpus.manifest.num_actions)) is not None:
        write_labels(out, labels)
    return PreparedCorpus.load(out)
