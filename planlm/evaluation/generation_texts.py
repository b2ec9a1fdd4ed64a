"""Continuations of held-out documents, in batches.

Their noise belongs to the document (`planlm.model.sampling`): plans share it, and texts differ by the plan alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from planlm.errors import InputError
from planlm.files import belonging, beside_result, locked
from planlm.model.attempts import GrowingTracker, write
from planlm.model.kept import KeptTexts
from planlm.model.sampling import SharedGumbel, left_padded, sampled
from planlm.model.tracking import SentenceTracker
from planlm.terminal import note

if TYPE_CHECKING:
    import datasets

    from planlm.config import EvaluateGenerationConfig
    from planlm.model.modeling import PlanLMForCausalLM

TEXTS = "generation_evaluation"
"""Folder of a run in which finished texts are kept, a file for each plan."""


@dataclass(frozen=True)
class Prompt:
    """The beginning of a document.

    Attributes:
        document: its number in the split.
        ids: tokens of its first sentences, behind the start token where there is one.
        truth: as many tokens of what follows as are to be generated.
        last_action: of the prompt's last sentence.
    """

    document: int
    ids: list[int]
    truth: list[int]
    last_action: int


def find_prompts(dataset: datasets.Dataset, config: EvaluateGenerationConfig, context: int) -> list[Prompt]:
    """The first documents of a split that are long enough behind their first sentences, as many as are asked for.

    Args:
        dataset: a split of a prepared corpus.
        config: how many prompts, of how many sentences, and the length of a continuation.
        context: positions that the LM has.

    Raises:
        InputError: no document is long enough, or there is no room for a continuation.
    """
    if config.max_new_tokens >= context:
        raise InputError(f"--max-new-tokens {config.max_new_tokens}: the LM's context is {context} tokens; set less")
    prompts = []
    rows = dataset.select_columns(["input_ids", "sentence_tokens", "actions"])
    for document, row in enumerate(rows):
        ids, counts = row["input_ids"], row["sentence_tokens"]
        length = sum(counts[: config.prompt_sentences])
        end = length + config.max_new_tokens
        if length > 0 and end <= min(len(ids), context) and len(counts) > config.prompt_sentences:
            last_action = row["actions"][config.prompt_sentences - 1]
            prompts.append(Prompt(document, ids[:length], ids[length:end], last_action))
        if len(prompts) == config.prompts:
            break
    asked = f"{config.max_new_tokens} tokens behind {config.prompt_sentences} sentences (within a context of {context})"
    if not prompts:
        raise InputError(
            f"{config.corpus}: no document of the {config.split} split has {asked}; set --max-new-tokens or "
            "--prompt-sentences lower"
        )
    if len(prompts) < config.prompts:
        note(f"evaluate-generation: only {len(prompts)} documents of the {config.split} split have {asked}")
    return prompts


@torch.no_grad()
def continue_prompts(
    model: PlanLMForCausalLM,
    prompts: Sequence[Prompt],
    selection: str,
    config: EvaluateGenerationConfig,
    step: Callable[[int], None],
    asked: dict[int, list[int]] | None = None,
) -> Iterator[list[tuple[Prompt, list[int]]]]:
    """Continue prompts by exactly `config.max_new_tokens` tokens each, a batch at a time.

    Sampling is temperature and top-p and nothing else, whatever the LM's own generation settings say, and no control
    token is drawn, an end token neither: prepared documents have none.

    Args:
        model: the joint model, with its encoder.
        prompts: what to continue; those of like length are continued together.
        selection: docs/method.md's name of the plan.
        config: length, sampling, seed and batch size.
        step: called with the number of texts at every token.
        asked: by document, the actions to follow.

    Yields:
        Prompts of a batch, each with its new tokens.
    """
    tokenizer, where = model.tokenizer, model.device
    known = max(tokenizer.get_vocab().values()) + 1  # an LM may have embeddings for more
    no_text = {*tokenizer.all_special_ids, *range(known, model.vocab_size)}
    padding = min(tokenizer.all_special_ids, default=0)
    model.generation_config = GenerationConfig(
        max_new_tokens=config.max_new_tokens, suppress_tokens=sorted(no_text) or None, pad_token_id=padding
    )
    order = sorted(prompts, key=lambda prompt: (len(prompt.ids), prompt.document))
    is_tried = asked is not None and config.attempts > 1
    size = max(1, config.batch_size // config.attempts) if is_tried else config.batch_size
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        keys = [(prompt.document, 0) for prompt in batch]
        texts = [prompt.ids for prompt in batch]
        plans = None if asked is None else [asked[prompt.document] for prompt in batch]
        if is_tried:
            tracker = GrowingTracker(tokenizer, model.encoder, plans)
            new = write(model, texts, keys, tracker, config, step, selection=selection, pad_token_id=padding)
            yield list(zip(batch, new, strict=True))
            continue
        ids, mask = left_padded(texts, padding, where)
        width = ids.shape[1]
        noise = SharedGumbel(config.seed, keys, width, step)
        found = model.generate(
            ids,
            attention_mask=mask,
            tracker=None if selection == "none" else SentenceTracker(tokenizer, model.encoder, plans),
            selection=selection,
            logits_processor=sampled(model.generation_config, config.temperature, config.top_p, noise),
            do_sample=False,
            use_cache=True,
        )
        yield list(zip(batch, found[:, width:].tolist(), strict=True))
        if config.temperature == 0:
            step(len(batch) * config.max_new_tokens)


@contextlib.contextmanager
def texts_folder(run: Path) -> Iterator[Path | None]:
    """The folder for a run's texts, held for this process; None where `run` is no run directory or cannot be written.

    Raises:
        InputError: another process works there, or the folder is a link out of the run.
    """
    folder = run / TEXTS
    with contextlib.ExitStack() as held:
        kept: Path | None = None
        if (run / "model").is_dir():
            belonging(folder, run)
            try:
                folder.mkdir(exist_ok=True)
                held.enter_context(locked(folder / "lock"))
                kept = folder
            except BlockingIOError as error:
                raise InputError(f"{folder}: {error.strerror} is at work here; wait until it ends") from None
            except OSError as error:
                note(f"planlm: warning: {folder} cannot be written ({error.strerror}); texts are not kept")
        yield kept


def keep_texts(path: Path, made_with: dict[str, Any], run: Path) -> KeptTexts:
    """A plan's finished texts in a run, their tokens by document; what cannot be written costs a warning."""

    def read(line: Any) -> tuple[int, list[int]]:
        return int(line["document"]), [int(token) for token in line["tokens"]]

    return KeptTexts(path, made_with, read, run, beside_result)
