"""Continue a prompt with a joint model and say which plan each sentence followed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from planlm.config import GenerateConfig
from planlm.errors import InputError
from planlm.files import appending, beside_result, write_text
from planlm.model.loading import load_model
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.steering import find_plan, find_steering
from planlm.model.tracking import SentenceTracker
from planlm.selections import SELECTIONS
from planlm.text.alignment import prompt_ids

TOP_ACTIONS = 3
"""Most probable actions reported for each sentence."""

_USUAL = {
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "output_attentions",
    "output_hidden_states", "use_cache",
}  # fmt: skip
"""Settings that every model comes with, and that are sound once it is loaded."""


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Continue `config.prompt`.

    Returns:
        `prompt`, `text` (the continuation), `selection`, `ban` and `favour` (nats by action), and `plan`: for each
        sentence continued or begun its text, the action forced on it, else the most probable one, with its label; the
        most probable actions of the plan it was written with and their probabilities, `ban` and `favour` included (none
        where the selection does not ask the planner); and the action forced on it, if any.
        `--audit` appends one line per sentence to a file; a run
        directory keeps the newest result in `generation.json`, for its report.

    Raises:
        InputError: no model, an empty prompt for an LM without a start token, or an action that does not exist.
    """
    if config.audit and not Path(config.audit).parent.is_dir():
        raise InputError(f"--audit {config.audit}: no such folder; make it first")
    model = load_model(config.run)
    selection = config.selection or model.config.selection
    if SELECTIONS[selection].needs_oracle:
        raise InputError(f"--selection {selection} needs the text that is yet to be written; choose soft or hard")
    if SELECTIONS[selection].needs_others:
        raise InputError(f"--selection {selection} needs the plans of another document; choose soft")
    if SELECTIONS[selection].needs_top_k and model.config.plan_top_k is None:
        raise InputError(f"--selection {selection}: {config.run} was not trained with --top-k; choose soft")
    steering = find_steering(config, model, selection)
    forced = find_plan(config.plan, model, selection, steering.ban, "--plan")
    tokenizer = model.tokenizer
    input_ids = torch.tensor([prompt_ids(tokenizer, config.prompt)], dtype=torch.long, device=model.device)
    if input_ids.shape[1] == 0:
        raise InputError("--prompt is empty, and this LM has no start token; give at least a word")
    context, length = model.lm.config.max_position_embeddings, input_ids.shape[1]
    if length + config.max_new_tokens > context:
        raise InputError(
            f"--max-new-tokens {config.max_new_tokens}: with the prompt's {length} tokens more than the context of "
            f"{context}; shorten one of the two"
        )
    tracker = SentenceTracker(tokenizer, model.encoder, forced, steering.bias(model.config.num_actions))
    torch.manual_seed(config.seed)
    sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    with torch.no_grad(), _usable_settings(config.run, model):
        ids = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            tracker=tracker,
            selection=selection,
            tokenizer=tokenizer,  # for stop strings of the model's generation settings
            max_new_tokens=config.max_new_tokens,
            return_dict_in_generate=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **(sampling if config.temperature > 0 else {"do_sample": False}),
        )[0].tolist()
    result = {
        "prompt": config.prompt,
        "text": tokenizer.decode(ids[length:], skip_special_tokens=True),
        "selection": selection,
        "ban": steering.ban,
        "favour": {str(action): nats for action, nats in steering.favour.items()},
        "plan": [] if selection == "none" else _describe(model, tracker, ids, length),
    }
    _keep(config, result)
    return result


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


def _keep(config: GenerateConfig, result: dict[str, Any]) -> None:
    """Write `generation.json` into a run directory, and the audit trail."""
    run = Path(config.run)
    if (run / "model").is_dir():
        with beside_result(run / "generation.json"):
            text = json.dumps(result, ensure_ascii=False, indent=1) + "\n"
            write_text(run / "generation.json", text, within=run)
    if config.audit:
        with beside_result(Path(config.audit)), appending(Path(config.audit)) as file:
            file.writelines(json.dumps(sentence, ensure_ascii=False) + "\n" for sentence in result["plan"])


def _label(model: PlanLMForCausalLM, action: int | None) -> str | None:
    labels = model.config.action_labels
    return None if labels is None or action is None else labels[action] or None


def _describe(
    model: PlanLMForCausalLM, tracker: SentenceTracker, ids: list[int], prompt_length: int
) -> list[dict[str, Any]]:
    """The sentence that the prompt left open and those after it, with the planner's distribution that each followed."""
    text = tracker.track(ids)
    first = len(tracker.track(ids[:prompt_length]).sentences)
    described = []
    for number, sentence in enumerate([*text.sentences, tracker.decode(ids[text.open_start :]).strip()]):
        if number < first or not sentence:
            continue
        actions, forced = [], tracker.forced(number - first)
        if (logits := text.finished[number].logits) is not None:
            probabilities = (logits.float() / model.config.plan_temperature).softmax(dim=-1)
            values, likely = probabilities.topk(min(TOP_ACTIONS, len(probabilities)))
            actions = [
                {"action": action, "label": _label(model, action), "probability": round(value, 4)}
                for action, value in zip(likely.tolist(), values.tolist(), strict=True)
            ]
        action = forced if forced >= 0 else actions[0]["action"] if actions else None
        described.append(
            {
                "sentence": sentence,
                "action": action,
                "label": _label(model, action),
                "actions": actions,
                "forced": None if forced < 0 else forced,
            }
        )
    return described
