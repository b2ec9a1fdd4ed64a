"""Continue prompts with a joint model and say which plan each sentence followed.

Sizes: B texts, W columns of their tokens, K actions.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planlm.config import GenerateConfig
from planlm.errors import InputError
from planlm.files import beside_result, checksum, write_text
from planlm.labels import show_action
from planlm.model.attempts import GrowingTracker, write
from planlm.model.audit import AuditTrail
from planlm.model.described import action_of, planned_sentences
from planlm.model.kept import KeptTexts
from planlm.model.loading import load_model, model_checksum
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.prompts import Prompt, find_prompts
from planlm.model.sampling import SharedGumbel, gumbel, left_padded, sampled
from planlm.model.steering import Steering, find_steering
from planlm.model.streaming import SentenceStreamer
from planlm.model.text import Text
from planlm.model.tracking import SentenceTracker, TrackedText
from planlm.progress import Progress
from planlm.selections import SELECTIONS
from planlm.terminal import note

_USUAL = {
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "output_attentions",
    "output_hidden_states", "use_cache",
}  # fmt: skip
"""Settings that every model comes with, and that are sound once it is loaded."""

_READ_PADDING = {
    "bad_words_ids", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "min_length", "no_repeat_ngram_size",
    "repetition_penalty", "sequence_bias",
}  # fmt: skip
"""Settings under which transformers takes padding for text: with one, only prompts of one length share a batch."""


_FROM_PROMPT = {
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "exponential_decay_length_penalty",
    "forced_eos_token_id", "max_time", "min_new_tokens",
}  # fmt: skip
"""Settings that take what stands there when transformers' `generate()` is called for the prompt."""

_DECISIVE = (
    "max_new_tokens", "temperature", "top_p", "plan", "ban", "favour", "attempts", "num_plans", "selection", "seed",
)  # fmt: skip
"""Options that decide what a text is."""


@dataclass(frozen=True)
class _Call:
    """What all texts of a call share."""

    config: GenerateConfig
    model: PlanLMForCausalLM
    selection: str
    steering: Steering
    trail: AuditTrail | None

    @property
    def samples(self) -> int:
        """Continuations of each prompt."""
        return self.config.num_plans or 1


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Continue `config.prompt`, or the prompts of a file.

    Returns:
        `prompt`, `text` (the continuation), `selection`, `ban` and `favour` (nats by action), and `plan`: for each
        sentence continued or begun its text, the action forced on it or drawn for it, else the most probable one, with
        its label; the most probable actions of the plan it was written with and their probabilities, `ban` and `favour`
        included (none where the selection does not ask the planner); and the actions forced and drawn, if any. With
        `num_plans` also `candidates`, best first, each with `text`, `plan` and `score`, the mean log-probability of its
        tokens (nats; None without any); `text` and `plan` are the first one's.

        Of a file `results`, one of these for each prompt, with its `id` if it has one; or, with `out`, `out` and the
        number of `prompts`, and the results stand in that file.

        `audit` appends a line for each sentence of every text to a file (docs/audit.md); a run directory keeps the
        newest result of `prompt` in `generation.json`, for its report.

    Raises:
        InputError: contradicting options, no model, a prompt that cannot be continued, or no such action.
    """
    _check(config)
    call = _call(config, load_model(config.run))
    prompts = find_prompts(config, call.model, call.selection, call.steering.ban)
    if config.prompts is not None and config.out is not None:
        return _to_file(call, prompts, Path(config.out))
    results = dict(pair for batch in _continued(call, prompts) for pair in batch)
    if config.prompts is not None:
        return {"results": [results[prompt.number] for prompt in prompts]}
    _keep(config, results[0])
    return results[0]


def continuing(
    config: GenerateConfig, model: PlanLMForCausalLM, prompts: list[Prompt] | None, option: str
) -> Callable[[], list[dict[str, Any]]]:
    """What continues the same prompts whenever it is called, with the model as it is by then.

    Args:
        config: as of `generate`; of the model it has the name alone.
        model: in evaluation mode when it is called.
        prompts: to continue; None: those of the file.
        option: what errors call the one that names the file.

    Returns:
        A function that gives a result of `generate` for each prompt.

    Raises:
        InputError: as `generate`.
    """
    call = _call(config, model)
    if prompts is None:
        prompts = find_prompts(config, model, call.selection, call.steering.ban, option)
    if model.plans(call.selection):
        _ = model.encoder  # read now: one that is not there is refused before any work

    def results() -> list[dict[str, Any]]:
        found = {
            prompt.number: result
            for some in _batches(call, prompts)
            for prompt, result in zip(some, _batch(call, some, lambda count: None), strict=True)
        }
        return [found[prompt.number] for prompt in prompts]

    return results


def _call(config: GenerateConfig, model: PlanLMForCausalLM) -> _Call:
    selection = _selection(config, model)
    steering = find_steering(config, model, selection)
    trail = AuditTrail(config, model.config, selection, steering) if config.audit else None
    return _Call(config, model, selection, steering, trail)


def _check(config: GenerateConfig) -> None:
    """Refuse options that contradict each other, and files that could not be written."""
    if (config.prompt is None) == (config.prompts is None):
        raise InputError("expected either --prompt TEXT or --prompts FILE")
    if config.prompts is None and config.out is not None:
        raise InputError(f"--out {config.out}: is for --prompts FILE; the result of --prompt is printed")
    if config.stream and (config.prompts is not None or config.num_plans is not None or config.attempts > 1):
        raise InputError("--stream: shows one text as it is written; leave --prompts, --num-plans and --attempts out")
    if config.attempts > 1 and config.temperature == 0:
        raise InputError("--attempts: all are the same at --temperature 0; set another temperature")
    for option, file in (("--audit", config.audit), ("--out", config.out)):
        if file and not Path(file).parent.is_dir():
            raise InputError(f"{option} {file}: no such folder; make it first")
    named = {"--prompts": config.prompts, "--out": config.out, "--audit": config.audit}
    if config.out is not None:
        named["what --out keeps meanwhile"] = f"{config.out}.unfinished"
    places: dict[str, str] = {}
    for option, file in named.items():
        if file and (other := places.setdefault(os.path.realpath(file), option)) != option:
            raise InputError(f"{option} {file}: the file of {other}, too; name another")


def _selection(config: GenerateConfig, model: PlanLMForCausalLM) -> str:
    """What is generated with, which this model and a text that is yet to be written can have."""
    selection = config.selection or model.config.selection
    if SELECTIONS[selection].needs_oracle:
        raise InputError(f"--selection {selection} needs the text that is yet to be written; choose soft or hard")
    if SELECTIONS[selection].needs_others:
        raise InputError(f"--selection {selection} needs the plans of another document; choose soft")
    if SELECTIONS[selection].needs_top_k and model.config.plan_top_k is None:
        raise InputError(f"--selection {selection}: {config.run} was not trained with --top-k; choose soft")
    if config.num_plans is not None and not SELECTIONS[selection].asks_planner:
        raise InputError(f"--num-plans: selection {selection} asks no planner; choose soft or hard")
    beams = model.generation_config.num_beams or 1
    if config.attempts > 1:
        _check_attempts(config, model, selection)
    if beams > 1 and config.temperature > 0 and (config.prompts is not None or config.num_plans is not None):
        raise InputError(
            f"{config.run}: samples of num_beams {beams} of its generation_config.json depend on what else is in the "
            "batch; set --temperature 0, or delete num_beams"
        )
    return selection


def _check_attempts(config: GenerateConfig, model: PlanLMForCausalLM, selection: str) -> None:
    """Refuse attempts where nothing is planned, or where settings count from where a call to `generate()` begins."""
    if not model.plans(selection):
        raise InputError(f"--attempts: nothing is planned under selection {selection} of this model; leave it out")
    own = model.generation_config.to_diff_dict()
    if found := sorted(_FROM_PROMPT & own.keys()) + ["num_beams"] * (own.get("num_beams", 1) > 1):
        raise InputError(
            f"--attempts: not with {', '.join(found)} of {config.run}'s generation_config.json; delete that, or leave "
            "--attempts out"
        )
    _ = model.centroids  # refused now where it has none


def _to_file(call: _Call, prompts: list[Prompt], out: Path) -> dict[str, Any]:
    """Write results to `out` once all are there; until then they are kept beside it as they are finished."""
    config = call.config
    made_with = {name: getattr(config, name) for name in _DECISIVE} | {
        "prompts": checksum(Path(str(config.prompts))),
        "model": model_checksum(config.run),
    }
    unfinished = out.with_name(f"{out.name}.unfinished")
    kept = KeptTexts(unfinished, made_with, lambda line: (int(line["number"]), line["result"]))
    if kept.done:
        note(f"generate: {len(kept.done):,} of {len(prompts):,} results are in {unfinished}")
    for batch in _continued(call, [prompt for prompt in prompts if prompt.number not in kept.done]):
        kept.add([{"number": number, "result": result} for number, result in batch])
        kept.done |= dict(batch)
    lines = [json.dumps(kept.done[prompt.number], ensure_ascii=False) + "\n" for prompt in prompts]
    write_text(out, "".join(lines))
    unfinished.unlink()
    return {"out": str(out), "prompts": len(prompts)}


def _continued(call: _Call, prompts: list[Prompt]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """The prompts' numbers and results, a batch at a time."""
    config, finished = call.config, 0
    texts, tokens = call.samples * len(prompts), config.max_new_tokens
    show = contextlib.nullcontext() if config.stream else Progress("generate", texts * tokens, "tokens")
    with show as progress:
        step = progress.advance if progress is not None else lambda count: None
        for batch in _batches(call, prompts):
            yield [(one.number, result) for one, result in zip(batch, _batch(call, batch, step), strict=True)]
            finished += len(batch) * call.samples * tokens
            if progress is not None:  # a text may end before its last token, and greedy ones tell no step
                progress.advance(finished - progress.count)


def _batches(call: _Call, prompts: list[Prompt]) -> Iterator[list[Prompt]]:
    """The prompts, a batch at a time, those of like length together."""
    own = call.model.generation_config.to_diff_dict()
    size = max(1, call.config.batch_size // (call.samples * call.config.attempts))
    alike = (lambda prompt: len(prompt.ids)) if _READ_PADDING & own.keys() else (lambda prompt: 0)
    for _, group in groupby(sorted(prompts, key=lambda prompt: (len(prompt.ids), prompt.number)), key=alike):
        some = list(group)
        yield from (some[start : start + size] for start in range(0, len(some), size))


@torch.no_grad()
def _batch(call: _Call, prompts: list[Prompt], step: Callable[[int], None]) -> list[dict[str, Any]]:
    """Results of prompts that are continued together; `step` is called with the number of texts at every token."""
    config, model, tokenizer = call.config, call.model, call.model.tokenizer
    rows = [prompt for prompt in prompts for _ in range(call.samples)]
    keys = [(prompt.number, sample) for prompt in prompts for sample in range(call.samples)]
    padding = next((id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id is not None), 0)
    settings = {
        "selection": call.selection,
        "tokenizer": tokenizer,  # for stop strings of the model's generation settings
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "pad_token_id": padding,
    }
    tracker = _tracker(call, rows)
    with _usable_settings(config.run, model):
        if config.attempts > 1:
            found = write(model, [row.ids for row in rows], keys, tracker, config, step, top_k=0, **settings)
        else:
            found = _written(call, rows, keys, tracker, step, settings)
    ends = model.generation_config.eos_token_id
    no_text = {padding, *(ends if isinstance(ends, list) else [ends])}
    texts = [_without_end(new, no_text) for new in found]
    made = []
    for number, (row, new) in enumerate(zip(rows, texts, strict=True)):
        sentences = []
        if call.selection != "none" or call.trail is not None:
            sentences = planned_sentences(model, tracker, row.ids, new, (number, len(rows)))
        if call.trail is not None:  # before it is kept: what a call that goes on finds is in the trail
            call.trail.add(row, number % call.samples, sentences)
        plan = [] if call.selection == "none" else [one.describe(model.config.action_labels) for one in sentences]
        made.append({"text": tokenizer.decode(new, skip_special_tokens=True), "plan": plan})
    if config.num_plans is not None:
        scores = _scores(call, tracker, [row.ids for row in rows], texts)
        made = [one | {"score": score} for one, score in zip(made, scores, strict=True)]
    each = [made[start : start + call.samples] for start in range(0, len(made), call.samples)]
    return [_result(call, prompt, own) for prompt, own in zip(prompts, each, strict=True)]


def _written(
    call: _Call,
    rows: Sequence[Prompt],
    keys: Sequence[tuple[int, int]],
    tracker: SentenceTracker,
    step: Callable[[int], None],
    settings: dict[str, Any],
) -> list[list[int]]:
    """New tokens of a batch's texts, written from beginning to end."""
    config, model = call.config, call.model
    ids, mask = left_padded([row.ids for row in rows], settings["pad_token_id"], model.device)
    if not model.plans(call.selection):  # then nothing else tells it what the prompts are
        tracker.start(ids, mask.bool())
    torch.manual_seed(config.seed)  # for what samples of beams are drawn by
    found = model.generate(
        ids,
        attention_mask=mask,
        tracker=tracker,
        streamer=_streamer(call, tracker, rows[0]) if config.stream else None,
        max_new_tokens=config.max_new_tokens,
        **_sampling(config, model, SharedGumbel(config.seed, keys, ids.shape[1], step)),
        **settings,
    )
    new: list[list[int]] = found[:, ids.shape[1] :].tolist()
    return new


def _tracker(call: _Call, rows: Sequence[Prompt]) -> GrowingTracker:
    """What follows the texts of a batch, one for each of `rows`, and has their plans."""
    config, settings = call.config, call.model.config

    def draw(row: int, sentence: int) -> Tensor:
        key = (config.seed, rows[row].number, sentence, row % call.samples, 1)
        return settings.plan_temperature * torch.from_numpy(gumbel(key, settings.num_actions))

    return GrowingTracker(
        call.model.tokenizer,
        call.model.encoder,
        [row.plan for row in rows],
        call.steering.bias(settings.num_actions),
        None if config.num_plans is None else draw,
    )


def _sampling(config: GenerateConfig, model: PlanLMForCausalLM, noise: SharedGumbel) -> dict[str, Any]:
    """Keywords of `generate()` for temperature and top-p; beams are drawn from as transformers does."""
    if config.temperature == 0:
        return {"do_sample": False}
    if (model.generation_config.num_beams or 1) > 1:
        return {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    processors = sampled(model.generation_config, config.temperature, config.top_p, noise)
    return {"do_sample": False, "top_k": 0, "logits_processor": processors}


@contextlib.contextmanager
def _usable_settings(run: str, model: PlanLMForCausalLM) -> Iterator[None]:
    """Say in one line that generation_config.json holds what transformers cannot generate with, as it does late."""
    try:
        yield
    except (TypeError, ValueError, OverflowError) as error:
        odd = sorted(model.generation_config.to_diff_dict().keys() - _USUAL)
        if isinstance(error, InputError) or not odd:
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{run}: cannot generate ({reason}) with the settings {', '.join(odd)} of its generation_config.json; "
            "mend or delete them"
        ) from error


def _without_end(tokens: list[int], no_text: set[int]) -> list[int]:
    """A text's tokens without its end token, and the padding that others of its batch made necessary."""
    end = len(tokens)
    while end and tokens[end - 1] in no_text:
        end -= 1
    return tokens[:end]


def _scores(
    call: _Call, tracker: SentenceTracker, prompts: Sequence[list[int]], texts: Sequence[list[int]]
) -> list[float | None]:
    """Mean log-probability (nats) of each text's tokens behind its prompt, under the plan that it was written with."""
    device = call.model.device
    ids, mask = left_padded([[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)], 0, device)
    labels = torch.full_like(ids, -100)
    for row, text in enumerate(texts):
        if text:
            labels[row, -len(text) - 1 : -1] = ids[row, -len(text) :]
    nll = call.model(
        ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        plan=Text(ids, mask.bool(), tracker),
        selection=call.selection,
        shift_labels=labels,
    ).token_nll
    sums = nll.double().sum(dim=1).tolist()
    return [-total / len(text) if text else None for total, text in zip(sums, texts, strict=True)]


def _result(call: _Call, prompt: Prompt, made: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of a prompt, from its continuations."""
    ranked = made
    if call.config.num_plans is not None:
        ranked = sorted(made, key=lambda one: math.inf if one["score"] is None else -one["score"])
    result = {
        "prompt": prompt.text,
        "text": ranked[0]["text"],
        "selection": call.selection,
        **call.steering.describe(),
        "plan": ranked[0]["plan"],
    }
    named = {} if prompt.id is None else {"id": prompt.id}
    return named | result | ({} if call.config.num_plans is None else {"candidates": ranked})


def _keep(config: GenerateConfig, result: dict[str, Any]) -> None:
    """Write `generation.json` into a run directory."""
    run = Path(config.run)
    if (run / "model").is_dir():
        with beside_result(run / "generation.json"):
            text = json.dumps(result, ensure_ascii=False, indent=1) + "\n"
            write_text(run / "generation.json", text, within=run)


def _streamer(call: _Call, tracker: SentenceTracker, prompt: Prompt) -> SentenceStreamer:
    """What shows a text on stderr, each sentence behind its action and that one's label."""

    def head(text: TrackedText) -> str:
        first = len(tracker.track(prompt.ids).sentences)
        action = action_of(tracker, (text.segments[-1] - first, 0), text.finished[-1].logits)
        return "" if action is None else show_action(action, call.model.config.action_labels)

    return SentenceStreamer(tracker, head, sys.stderr)
