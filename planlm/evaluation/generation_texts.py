"""Continuations of held-out documents, in batches, with random numbers that belong to the prompt.

A sampled token is the arg-max of `log p + G` with standard Gumbel noise G (the Gumbel-max trick: an exact draw from p).
The noise of a token is a function of seed, document and position, so that a text does not depend on the batch it is
written in, and texts under several plans share their noise: they differ by the plan alone.

Sizes: B texts, W columns of a batch's prompts, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from planlm.corpus.writing import checksum
from planlm.errors import InputError
from planlm.files import appending, belonging, beside_result, locked, write_text
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


class SharedGumbel(LogitsProcessor):
    """Adds to the logits of each text the noise of its document and position.

    Args:
        seed: of all noise.
        documents: numbers of the B texts' documents.
        width: columns W of their prompts.
        step: called with the number of texts at every token.
    """

    def __init__(self, seed: int, documents: Sequence[int], width: int, step: Callable[[int], None]) -> None:
        self.seed, self.documents, self.width, self.step = seed, documents, width, step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[B, V]` with noise, float32."""
        position = input_ids.shape[1] - self.width
        self.step(len(scores))
        noise = [gumbel(self.seed, document, position, scores.shape[1]) for document in self.documents]
        return scores.float() + torch.from_numpy(np.stack(noise)).to(scores.device)


def gumbel(seed: int, document: int, position: int, size: int) -> np.ndarray:
    """Standard Gumbel noise for the tokens of a vocabulary, float32 [size]."""
    # Of float64: in float32 an exponential variate of 0, whose noise is infinite, would come up now and then.
    variates = np.random.default_rng((seed, document, position)).standard_exponential(size)
    noise: np.ndarray = -np.log(variates, out=variates)
    return noise.astype(np.float32)


@torch.no_grad()
def continue_prompts(
    model: PlanLMForCausalLM,
    prompts: Sequence[Prompt],
    selection: str,
    config: EvaluateGenerationConfig,
    step: Callable[[int], None],
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
    for start in range(0, len(order), config.batch_size):
        batch = order[start : start + config.batch_size]
        width = max(len(prompt.ids) for prompt in batch)
        ids = [nn.functional.pad(torch.tensor(p.ids), (width - len(p.ids), 0), value=padding) for p in batch]
        mask = [nn.functional.pad(torch.ones(len(p.ids)), (width - len(p.ids), 0)) for p in batch]
        processors = LogitsProcessorList()
        if config.temperature not in (0, 1):
            processors.append(TemperatureLogitsWarper(config.temperature))
        if config.temperature > 0:
            if config.top_p < 1:
                processors.append(TopPLogitsWarper(config.top_p))
            processors.append(SharedGumbel(config.seed, [p.document for p in batch], width, step))
        found = model.generate(
            torch.stack(ids).to(where),
            attention_mask=torch.stack(mask).long().to(where),
            tracker=None if selection == "none" else SentenceTracker(tokenizer, model.encoder),
            selection=selection,
            logits_processor=processors,
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


class KeptTexts:
    """Finished texts of one plan on disk: a line that says what they were made with, then a line for each.

    Args:
        path: the file; one that was made with something else, or is damaged at its beginning, is begun anew.
        made_with: all that decides a text, ready for JSON.
        within: the run directory.

    Attributes:
        tokens: of each finished text, by its document's number.
    """

    def __init__(self, path: Path, made_with: dict[str, Any], within: Path) -> None:
        self._path, self._within, self._is_kept = path, within, False
        self.tokens: dict[int, list[int]] = {}
        with beside_result(path):
            lines = self._read(made_with)
            write_text(path, "".join(line + "\n" for line in lines), within)
            self._is_kept = True

    def _read(self, made_with: dict[str, Any]) -> list[str]:
        """Sound lines of the file, up to the first that is not, as the last of a killed process may be."""
        first = json.dumps({"made_with": made_with}, ensure_ascii=False)
        path = belonging(self._path, self._within)
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else [first]
        if lines[0] != first:
            note(f"{self._path}: made with another model or other settings; begun anew")
            return [first]
        for number, line in enumerate(lines[1:], 1):
            try:
                text = json.loads(line)
                self.tokens[int(text["document"])] = [int(token) for token in text["tokens"]]
            except (ValueError, TypeError, LookupError):
                return lines[:number]
        return lines

    def add(self, texts: Sequence[dict[str, Any]]) -> None:
        """Write texts, each with `document` and `tokens`; after a failure, which is said, no more are written."""
        self.tokens |= {text["document"]: text["tokens"] for text in texts}
        if self._is_kept:
            self._is_kept = False
            with beside_result(self._path), appending(self._path, self._within) as file:
                file.writelines(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
                self._is_kept = True


def weights_checksum(run: Path) -> str:
    """What a run's model is: checksums of its weights and configuration."""
    files = [run / "model" / "config.json", *sorted((run / "model").glob("*.safetensors"))]
    return " ".join(checksum(file) for file in files)
