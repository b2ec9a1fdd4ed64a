"""What `planlm generate` is to continue: one text, or those of a file, checked before anything is generated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planlm.config import GenerateConfig
from planlm.errors import InputError
from planlm.files import is_utf8
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.steering import find_plan
from planlm.settings import shown
from planlm.text.alignment import prompt_ids

FIELDS = ("prompt", "plan", "id")
"""What a row of a .jsonl file can have."""


@dataclass(frozen=True)
class Prompt:
    """A text to continue.

    Attributes:
        number: its row in the file, from 0; the random numbers of its continuation are this one's.
        text: the text.
        ids: its tokens.
        plan: actions for the sentence that it leaves open and those after it, -1 for the planner's.
        id: what the file calls it.
    """

    number: int
    text: str
    ids: list[int]
    plan: list[int]
    id: str | int | None = None


def find_prompts(
    config: GenerateConfig, model: PlanLMForCausalLM, selection: str, ban: list[int], option: str = "--prompts"
) -> list[Prompt]:
    """The prompt, or those of the file.

    Args:
        config: names them, and a plan for those that have none of their own.
        model: what is to continue them.
        selection: what it generates with.
        ban: actions that no plan may ask for.
        option: what errors call the one that names the file.

    Raises:
        InputError: no such file, or a prompt or plan that cannot be, by file and line.
    """
    default = find_plan(config.plan, model, selection, ban, "--plan")
    if config.prompts is None:
        assert config.prompt is not None
        rows = iter([("--prompt", {"prompt": config.prompt})])
    else:
        rows = _rows(Path(config.prompts), option)
    found = []
    for number, (where, row) in enumerate(rows):
        plan, text = row.get("plan"), row["prompt"]
        own = default if plan is None else find_plan(plan, model, selection, ban, f"{where}: plan")
        found.append(Prompt(number, text, _ids(text, where, config, model), own, row.get("id")))
    if not found:
        raise InputError(f"{config.prompts}: holds no prompt")
    return found


def _ids(text: str, where: str, config: GenerateConfig, model: PlanLMForCausalLM) -> list[int]:
    """Tokens of a prompt behind which there is room."""
    ids, context = prompt_ids(model.tokenizer, text), model.lm.config.max_position_embeddings
    if not ids:
        raise InputError(f"{where} is empty, and this LM has no start token; give at least a word")
    if len(ids) + config.max_new_tokens > context:
        at = "" if config.prompts is None else f"{where}: "
        raise InputError(
            f"{at}--max-new-tokens {config.max_new_tokens}: with the prompt's {len(ids)} tokens more than the context "
            f"of {context}; shorten one of the two"
        )
    return ids


def _rows(path: Path, option: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file, each behind its place for messages."""
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"{option} {path}: expected a .txt file, a prompt a line, or a .jsonl file")
    if not path.is_file():
        raise InputError(f"{option} {path}: no such file")
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), 1):
        where = f"{path}:{number}"
        try:
            text = line.removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{where}: not UTF-8; save the file in this encoding") from None
        if not text.strip():
            raise InputError(f"{where}: an empty line; delete it")
        yield where, {"prompt": text} if path.suffix == ".txt" else _object(text, where)


def _object(line: str, where: str) -> dict[str, Any]:
    """A row of a .jsonl file, its plan as `--plan` has it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not valid JSON") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise InputError(f"{where}: expected an object with a text 'prompt', got {shown(row)}")
    if unknown := sorted(row.keys() - set(FIELDS)):
        raise InputError(f"{where}: unknown field {shown(unknown[0])}; a row has {', '.join(FIELDS)}")
    plan, id = row.get("plan"), row.get("id")
    if isinstance(plan, list) and plan and all(type(action) in (int, str) for action in plan):
        plan = row["plan"] = ",".join(map(str, plan))
    if not isinstance(plan, str | None):
        raise InputError(f"{where}: plan: expected a text as --plan takes it, or a list of actions, got {shown(plan)}")
    if type(id) not in (int, str, type(None)):
        raise InputError(f"{where}: id: expected a text or a whole number, got {shown(id)}")
    if not is_utf8(f"{row['prompt']}{id}"):
        raise InputError(f"{where}: holds half of a character (a lone surrogate); mend it")
    return row
