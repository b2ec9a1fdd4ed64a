"""Tasks of an experiment in a process of their own: `python -m planlm.experiments.cell OUT`, with the tasks on stdin.

A task's record is written last and at once. The process holds the lock of the task's folder, so that several
commands and ranks can work on an experiment, and it stops, with a checkpoint, when whoever started it has gone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from planlm.errors import InputError
from planlm.experiments.record import read_record, write_record
from planlm.experiments.workers import exit_status
from planlm.files import locked, read_json
from planlm.signals import ending, handling, terminate

BUSY = 75
"""Exit status where another process is at work on the task."""

EMBEDDED = "embedded:leads"
"""Input that stands for the first paragraphs of Wikipedia articles that a package carries."""


def main(out: Path) -> int:
    """Do the tasks on stdin; the exit status, as the command line has it, or `BUSY`."""
    tasks = json.loads(sys.stdin.readline())
    threading.Thread(target=_watch, daemon=True).start()

    def work() -> None:
        with handling(terminate, *ending()):
            for task in tasks:
                with locked(out / "cells" / f"{Path(task['folder']).name}.lock"):
                    _do(out, task)

    try:
        return exit_status(work)
    except BlockingIOError:
        return BUSY


def _watch() -> None:
    """Stop when the other end of stdin has gone, however that process ended."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _do(out: Path, task: dict[str, Any]) -> None:
    record = out / "cells" / f"{task['key']}.json"
    if record.exists():
        return
    began, start = datetime.now(UTC), time.monotonic()
    _check_contents(task["settings"].get("contents", {}))
    result = KINDS[task["kind"]](out, task)
    write_record(
        record,
        {
            **task,
            "began": began.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - start, 1),
            "threads": int(os.environ.get("OMP_NUM_THREADS", 0)),
            "result": result,
        },
    )


def _check_contents(contents: dict[str, str]) -> None:
    """Refuse corpora that have changed since the tasks were planned: a result would be kept as another corpus'."""
    from planlm.corpus.store import PreparedCorpus

    for folder, content in contents.items():
        if PreparedCorpus.load(folder).fingerprint != content:
            raise InputError(f"{folder}: has changed since the experiment was started; start it again")


def _corpus(out: Path, task: dict[str, Any]) -> dict[str, Any]:
    from planlm.config import PrepareConfig
    from planlm.corpus.prepare import prepare

    options, folder = task["settings"]["prepare"], Path(task["settings"]["folder"])
    if EMBEDDED in options["inputs"]:
        from planlm.experiments.leads import write_leads

        source = folder.parent / "leads.jsonl"
        write_leads(source)
        options = options | {"inputs": [str(source) if name == EMBEDDED else name for name in options["inputs"]]}
    corpus = prepare(PrepareConfig(**options, out=str(folder)))
    return {"splits": corpus.manifest.splits, "actions": corpus.manifest.num_actions}


def _lm(out: Path, task: dict[str, Any]) -> dict[str, Any]:
    from planlm.config import SmallLMConfig
    from planlm.corpus.store import PreparedCorpus
    from planlm.experiments.small_lm import pretrain_lm

    corpus = PreparedCorpus.load(task["settings"]["corpus"])
    texts = (document["text"] for document in corpus.split("train").select_columns("text"))
    pretrain_lm(texts, out / task["folder"], SmallLMConfig(**task["settings"]["pretrain"]))
    return {}


def _tokens(out: Path, task: dict[str, Any]) -> dict[str, Any]:
    """A corpus in an LM's tokens: the one that there is if it has them already."""
    from planlm.corpus.store import PreparedCorpus
    from planlm.experiments.small_lm import retokenize
    from planlm.pretrained.tokenizer import load_tokenizer, tokenizer_fingerprint

    settings = task["settings"]
    corpus = PreparedCorpus.load(settings["corpus"])
    if tokenizer_fingerprint(load_tokenizer(settings["lm"])) == corpus.manifest.tokenizer_fingerprint:
        return {"corpus": settings["corpus"]}
    made = retokenize(corpus, settings["lm"], out / task["folder"])
    return {"corpus": str(made.path), "splits": made.manifest.splits}


def _planner(out: Path, task: dict[str, Any]) -> dict[str, Any]:
    from planlm.config import PlannerConfig
    from planlm.training.pretrain_planner import pretrain_planner

    settings, run = task["settings"], out / task["folder"]
    metrics = pretrain_planner(
        PlannerConfig(**settings["options"], corpus=settings["corpus"], out=str(run), resume=True)
    )
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return metrics


def _train(out: Path, task: dict[str, Any]) -> dict[str, Any]:
    from planlm.config import TrainConfig
    from planlm.precision import device, device_name
    from planlm.training.train import train

    settings, run = task["settings"], out / task["folder"]
    planner = settings["planner"]
    config = TrainConfig(
        **settings["options"] | _corpora(out, settings),
        corpus=_in_tokens(out, settings["tokens"], settings),
        lm=settings["lm"],
        planner=str(out / _needed(out, planner)["folder"]) if planner else None,
        out=str(run),
        resume=True,
    )
    last = train(config)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return {
        "tokens": lines[-1]["tokens"],
        "seconds": lines[-1].get("seconds"),
        "tokens_per_second": sorted(rates)[len(rates) // 2] if rates else None,
        "memory": lines[-1].get("memory"),
        "device": device_name(device()),
        "last": {name: value for name, value in last.items() if isinstance(value, int | float)},
    }


def _evaluate(out: Path, task: dict[str, Any]) -> dict[str, Any]:
    """The result with every document's scores, which `evaluate` leaves in the run."""
    from planlm.config import EvaluateConfig
    from planlm.evaluation.evaluate import RESULTS, evaluate

    settings, run = task["settings"], out / task["folder"]
    config = EvaluateConfig(
        **settings["options"] | _corpora(out, settings),
        run=str(run),
        corpus=_in_tokens(out, settings["tokens"], settings),
    )
    result = evaluate(config)
    kept = read_json(run / RESULTS)[config.split]
    return {**kept, **result, "scores": kept["scores"]}


def _needed(out: Path, key: str) -> dict[str, Any]:
    """The record of a task that this one needs."""
    return read_record(out / "cells" / f"{key}.json")


def _in_tokens(out: Path, key: str, settings: dict[str, Any]) -> str:
    """The folder of a corpus in the LM's tokens, wherever it and the experiment are by now."""
    record = _needed(out, key)
    return str(out / record["folder"]) if "splits" in record["result"] else settings["sources"][key]


def _corpora(out: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Options that name another corpus, as its folder in the LM's tokens."""
    return {name: _in_tokens(out, key, settings) for name, key in settings["corpora"].items()}


KINDS = {
    "corpus": _corpus,
    "lm": _lm,
    "tokens": _tokens,
    "planner": _planner,
    "train": _train,
    "evaluate": _evaluate,
}
"""What is done, by the task's kind."""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
