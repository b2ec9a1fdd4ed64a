"""The commands that repeat a run, from what is on disk."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from planlm.config import CommandConfig, PlannerConfig, PrepareConfig, TrainConfig
from planlm.errors import InputError
from planlm.files import read_json
from planlm.flat_yaml import read_flat
from planlm.report.results import CONFIG, Run

MANIFEST = "corpus.json"


def commands(run: Run) -> list[str]:
    """How the run's corpus, planner and model were made, as far as it can be read, each in a line for a shell.

    Options stand there that differ from the defaults.
    """
    made = []
    corpus = Path(str(run.config.get("corpus") or ""))
    if (corpus / MANIFEST).is_file():
        made.append(_prepare(corpus))
    planner = Path(str(run.config.get("planner") or ""))
    if not run.planner and run.config.get("planner") and (planner / CONFIG).is_file():
        made.append(_command("pretrain-planner", PlannerConfig, read_flat(planner / CONFIG)))
    if run.planner:
        made.append(_command("pretrain-planner", PlannerConfig, run.config))
    elif "selection" in run.config:
        made.append(_command("train", TrainConfig, run.config))
    return [line for line in made if line]


def _prepare(corpus: Path) -> str:
    """As the corpus' manifest says it; empty where it cannot be read."""
    try:
        manifest = read_json(corpus / MANIFEST)
    except InputError:
        return ""
    settings, sources = manifest.get("settings"), manifest.get("sources")
    if not isinstance(settings, dict) or not isinstance(sources, list):
        return ""
    inputs = [str(source.get("input")) for source in sources if isinstance(source, dict)]
    options = {**settings, "encoder": manifest.get("encoder"), "tokenizer": manifest.get("tokenizer"), "out": corpus}
    return _command("prepare", PrepareConfig, options, inputs)


def _command(name: str, config: type[CommandConfig], options: Mapping[str, Any], words: list[str] | None = None) -> str:
    return shlex.join(["planlm", name, *(words or ()), *_flags(config, options)])


def _flags(config: type[CommandConfig], options: Mapping[str, Any]) -> Iterator[str]:
    for field in fields(config):
        value = options.get(field.name)
        if field.metadata.get("positional") or field.name in ("json", "resume") or value is None:
            continue
        name = field.name.replace("_", "-")
        flag = f"--{name}"
        if isinstance(field.default, bool):
            if value != field.default:
                yield flag if value else "--" + f"no-{name}"
        elif isinstance(value, list | tuple):
            yield from (word for one in value for word in (flag, str(one)))
        elif field.default is MISSING or str(value) != str(field.default):
            yield from (flag, str(value))
