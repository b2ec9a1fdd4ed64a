"""The commands as functions: `planlm.train(corpus="corpus", out="run")` is `planlm train --corpus corpus --out run`.

Each takes the options of its command by name, with their defaults and ranges, and returns what the command prints. A
command's code, and with it torch, is imported when its function is called.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec

from planlm.config import (
    AuditConfig,
    AuditProbeConfig,
    EvaluateConfig,
    GenerateConfig,
    PlanBudgetConfig,
    PlannerConfig,
    PrepareConfig,
    TrainConfig,
)
from planlm.errors import InputError

if TYPE_CHECKING:
    from planlm.corpus.store import PreparedCorpus

P = ParamSpec("P")


def _command(config: Callable[P, Any], run: str) -> Callable[P, dict[str, Any]]:
    """The function that takes a command's settings by name; `run` is "module:function"."""
    module, name = run.split(":")

    def command(*args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        settings = config(*args, **kwargs)
        return getattr(importlib.import_module(module), name)(settings)

    command.__name__ = command.__qualname__ = name
    command.__signature__ = inspect.signature(config)  # type: ignore[attr-defined]
    command.__doc__ = f"""{config.__doc__}

    Takes the options of `planlm {name.replace("_", "-")}` by name, which its `--help` explains; returns what
    `{module}.{name}` does.

    Raises:
        InputError: settings or inputs that cannot be, in one line.
        MachineError: the machine failed; what is finished stays.
    """
    return command


def prepare(texts: Iterable[str | Mapping[str, Any]] | None = None, **settings: Any) -> PreparedCorpus:
    """Raw text to a prepared corpus: sentences, embeddings, codebook, actions, tokens.

    Takes the options of `planlm prepare` by name; files and folders are `inputs`. A corpus of texts in memory is that
    of a file with the same rows, and an interrupted call goes on where it stopped.

    Args:
        texts: in place of `inputs`: texts, or rows with text and id under the names `text_field` and `id_field`, as a
            list or a `datasets.Dataset`. They are read twice; what can be read once only is kept in memory. Without an
            id a text is known by its place: `texts:1`.
        settings: `out`, `tokenizer`, `actions`, ...

    Raises:
        InputError: texts or settings that cannot be, in one line that names the row.
        MachineError: the machine failed; the same call goes on from there.
    """
    from planlm.corpus.prepare import prepare as run

    if texts is None:
        return run(PrepareConfig(**settings))
    if "inputs" in settings:
        raise InputError("prepare: both texts and inputs (files) are given; leave one out")
    return run(PrepareConfig(inputs=("texts",), **settings), texts)


pretrain_planner = _command(PlannerConfig, "planlm.training.pretrain_planner:pretrain_planner")
train = _command(TrainConfig, "planlm.training.train:train")
plan_budget = _command(PlanBudgetConfig, "planlm.training.budget:plan_budget")
evaluate = _command(EvaluateConfig, "planlm.evaluation.evaluate:evaluate")
generate = _command(GenerateConfig, "planlm.model.generation:generate")
audit = _command(AuditConfig, "planlm.evaluation.audit:audit")
audit_probe = _command(AuditProbeConfig, "planlm.evaluation.probe:audit_probe")
