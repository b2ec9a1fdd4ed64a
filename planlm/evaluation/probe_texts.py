"""The texts of a bias probe: its file, and what the model makes of each.

Sizes: P prompts, V names of all groups, K actions, B texts at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from planlm.corpus.batches import IGNORED
from planlm.errors import InputError
from planlm.evaluation.significance import MIN_DOCUMENTS
from planlm.files import is_utf8
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.sampling import left_padded
from planlm.model.text import Text
from planlm.model.tracking import SentenceTracker
from planlm.progress import Progress
from planlm.text.alignment import encode, start_tokens
from planlm.text.sentences import ends_sentence

PLACEHOLDER = "{X}"

MOST = 20
"""Characters of a group's name, which heads columns."""

MIN_NAMES = 4
"""Of a group. Four and four can be divided in 35 ways, three and three in 10, none of which is rarer than 5 %."""

AT_ONCE = 16
"""Texts in a forward pass."""


@dataclass(frozen=True)
class Probe:
    """A probe's file.

    Attributes:
        prompts: texts with the placeholder, of one sentence or several.
        groups: names by group.
    """

    prompts: list[str]
    groups: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        """Of all groups, one behind the other, `[V]`."""
        return [name for names in self.groups.values() for name in names]


def read_probe(path: Path) -> Probe:
    """Read `{"prompts": ["{X} ..."], "groups": {"a": [...], "b": [...]}}`.

    Raises:
        InputError: the file is not of that form, or says too little to compare; names the prompt or group.
        OSError: it cannot be read.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not valid JSON") from None
    if not isinstance(content, dict) or content.keys() != {"prompts", "groups"}:
        raise InputError(f"{path}: expected an object with prompts and groups, as in examples/probe.json")
    prompts, groups = content["prompts"], content["groups"]
    if not isinstance(prompts, list) or len(prompts) < MIN_DOCUMENTS:
        raise InputError(f"{path}: prompts: expected a list of at least {MIN_DOCUMENTS} texts")
    for number, prompt in enumerate(prompts, 1):
        if not _is_text(prompt) or PLACEHOLDER not in prompt:
            raise InputError(f"{path}: prompt {number}: expected a text with {PLACEHOLDER} where a name goes")
    if len(set(prompts)) < len(prompts):
        raise InputError(f"{path}: prompts: one is there twice; each has to add something")
    if not isinstance(groups, dict) or len(groups) < 2:
        raise InputError(f"{path}: groups: expected two or more, each with its names")
    for group, names in groups.items():
        if not _is_text(group) or len(group) > MOST or not group.isprintable():
            raise InputError(f"{path}: group {group!r:.40}: expected a name of at most {MOST} characters on one line")
        if not isinstance(names, list) or not all(map(_is_text, names)) or len(set(names)) < max(len(names), MIN_NAMES):
            raise InputError(f"{path}: group {group!r:.40}: expected a list of at least {MIN_NAMES} different names")
    return Probe([prompt.strip() for prompt in prompts], groups)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and is_utf8(value)


@dataclass(frozen=True)
class _Filled:
    """A prompt with a name in it: its tokens, and which of them are scored (1, else 0)."""

    ids: list[int]
    scored: list[int]


def _fill(tokenizer: Any, prompt: str, name: str, where: str) -> _Filled:
    """Fill a prompt in; scored are tokens behind the first name that hold none of a name.

    Raises:
        InputError: there is no such token, or the prompt does not end a sentence.
    """
    parts = prompt.split(PLACEHOLDER)
    text = name.join(parts)
    if not ends_sentence(text):
        raise InputError(f"{where}: does not end a sentence, behind which the next one could be planned")
    lefts = np.cumsum(list(map(len, parts[:-1]))) + len(name) * np.arange(len(parts) - 1)
    ids, starts = encode(tokenizer, text)
    ends = np.append(starts[1:], len(text))
    scored = starts >= lefts[0] + len(name)
    for left in lefts:
        scored &= (ends <= left) | (starts >= left + len(name))
    if not scored.any():
        raise InputError(f"{where}: has no token to score behind the name")
    start = start_tokens(tokenizer)
    return _Filled([*start, *ids.tolist()], [*[0] * len(start), *scored.astype(int).tolist()])


def run_probe(model: PlanLMForCausalLM, probe: Probe, where: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the model makes of every prompt with every name.

    Args:
        model: with a planner.
        probe: the prompts and names.
        where: the file, for errors.

    Returns:
        The planner's distribution for the next sentence, `[P, V, K]`, and NLL per scored token (nats), `[P, V]`.

    Raises:
        InputError: a prompt that cannot be filled in, or is longer than the LM's context.
    """
    shape, context = (len(probe.prompts), len(probe.names)), model.lm.config.max_position_embeddings
    texts = []
    for number, prompt in enumerate(probe.prompts, 1):
        for name in probe.names:
            place = f"{where}: prompt {number} with {name!r:.40}"
            texts.append(_fill(model.tokenizer, prompt, name, place))
            if len(texts[-1].ids) > context:
                raise InputError(f"{place}: longer than the LM's context of {context} tokens")
    plans = np.empty((len(texts), model.config.num_actions))
    nll = np.empty(len(texts))
    order = np.argsort([len(text.ids) for text in texts], kind="stable")  # pad as little as can be
    with Progress("probe", len(texts), "texts") as progress, torch.no_grad():
        for part in np.split(order, range(AT_ONCE, len(order), AT_ONCE)):
            plans[part], nll[part] = _run(model, [texts[at] for at in part])
            progress.advance(len(part))
    return plans.reshape(*shape, -1), nll.reshape(shape)


def _run(model: PlanLMForCausalLM, texts: Sequence[_Filled]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distributions `[B, K]` and NLL `[B]` of a batch."""
    ids, mask = left_padded([text.ids for text in texts], 0, model.device)
    scored, _ = left_padded([text.scored for text in texts], 0, model.device)
    tracker = SentenceTracker(model.tokenizer, model.encoder)
    output = model(
        ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        plan=Text(ids, mask.bool(), tracker),
        use_cache=False,
        shift_labels=torch.where(scored > 0, ids, IGNORED).roll(-1, dims=1),  # the first column is never scored
    )
    nll = output.token_nll.double().sum(dim=1) / scored.sum(dim=1)
    ended = [tracker.track(text.ids, number, len(texts)).finished[-1] for number, text in enumerate(texts)]
    logits = torch.stack([sentence.logits.double() for sentence in ended if sentence.logits is not None])
    return (logits / model.config.plan_temperature).softmax(dim=-1).cpu().numpy(), nll.cpu().numpy()
