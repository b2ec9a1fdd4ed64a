"""`planlm quickstart`: the whole path on real text and real pre-trained weights, from installed packages alone.

Text, sentences, codebook and planner come first. Then two LMs are each trained and evaluated under one plan after
another, side by side, each in a process of its own: SmolLM2-135M, pre-trained on two trillion tokens, and a small
GPT-2 that is first trained here. What is finished is skipped when the quickstart is called again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from planlm import __version__
from planlm.config import (
    DEFAULT_LM,
    ActionsConfig,
    GenerateConfig,
    PlannerConfig,
    PrepareConfig,
    QuickstartConfig,
    ReportConfig,
)
from planlm.corpus.actions import describe_actions
from planlm.corpus.prepare import prepare
from planlm.corpus.store import FORMAT_VERSION, MANIFEST
from planlm.errors import InputError, MachineError
from planlm.experiments.leads import leads, write_leads
from planlm.files import check_own, read_json, write_json
from planlm.home import python_module
from planlm.model.generation import generate
from planlm.quickstart.table import KEPT, Table, collect
from planlm.report.page import write_report
from planlm.report.plots import perplexity_figure, save_png
from planlm.terminal import note
from planlm.training.pretrain_planner import pretrain_planner

ACTIONS = 256
MIN_SENTENCES = 5
"""Leads with fewer give a planner nothing to go on; a quarter of the 10,033 have as many."""

WINDOW = 64
"""Tokens of context. Shorter than a lead (155 on average): there a plan knows something that the LM does not."""

SMOL_TRAINING = {
    "steps": 50, "batch_size": 4, "window": WINDOW, "conditioned_layers": 6, "lr": 5e-3, "codebook_lr": 5e-4,
    "planner_lr": 5e-4,
}  # fmt: skip
SMALL_TRAINING = {
    "steps": 200, "batch_size": 16, "window": WINDOW, "conditioned_layers": 2, "lr": 2e-2, "codebook_lr": 2e-3,
    "planner_lr": 5e-4,
}  # fmt: skip

SMOL, SECONDS = "smollm2", "seconds.json"
"""Folder of SmolLM2's runs, and what each stage took."""

PROMPT = "The Indian elephant is one of three living subspecies of the Asian elephant. It is native to mainland Asia."


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Run every stage that is not finished yet in the folder `config.out`.

    Returns:
        `tables` (see `planlm.quickstart.table.collect`), `planner` (metrics of its pre-training), `generation` (a
        text with its plan), `actions` (terms of the actions planned in it), `seconds` by stage, and `paths`.

    Raises:
        InputError: a package with text or weights is missing, or `out` holds something else.
        MachineError: a stage failed.
        KeyboardInterrupt: once both processes have stopped; the next call goes on from there.
    """
    out = Path(config.out)
    _open(out, config)
    with _stage(out, "corpus: sentences, embeddings, actions"):
        _corpus(out, config.seed)
    with _stage(out, "planner"):
        planner = _planner(out, config.seed)
    tables = _tables(out, config.seed)
    with _stage(out, "two tables, side by side"):
        _side_by_side(tables, out)
    results = [collect(table) for table in tables]
    with _stage(out, "generation and report"):
        generation, actions = _generation(out, config.seed)
        paths = _pages(results, tables, out)
    result = {
        "tables": results,
        "planner": planner,
        "generation": generation,
        "actions": actions,
        "seconds": read_json(out / SECONDS),
        "paths": {
            "corpus": str(out / "corpus"),
            "planner": str(out / "planner"),
            "model": str(Path(tables[0].out) / KEPT),
            "small model": str(Path(tables[1].out) / KEPT),
            **paths,
            "results": str(out / "quickstart.json"),
        },
    }
    write_json(out / "quickstart.json", result)
    return result


def _open(out: Path, config: QuickstartConfig) -> None:
    """Make the folder; refuse one that holds something else, or a quickstart with another seed or version."""
    check_own(out)
    record = out / "settings.json"
    settings = {"seed": config.seed, "version": __version__}
    if record.is_file():
        if read_json(record) != settings:
            raise InputError(f"{out}: holds a quickstart with other settings; delete it or choose another --out")
        made = out / "corpus" / MANIFEST
        if made.is_file() and read_json(made).get("format_version") != FORMAT_VERSION:
            raise InputError(f"{out}: holds a quickstart of another PlanLM; delete it or choose another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: holds other files; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(record, settings)


@contextlib.contextmanager
def _stage(out: Path, name: str) -> Iterator[None]:
    """Announce a stage and add what it takes, however it ends, to what it took in earlier calls."""
    note(f"== {name}")
    started = time.monotonic()
    try:
        yield
    finally:
        seconds = read_json(out / SECONDS) if (out / SECONDS).is_file() else {}
        seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - started, 1)
        write_json(out / SECONDS, seconds)


def _corpus(out: Path, seed: int) -> None:
    """Prepare the corpus of the longer leads; the shorter ones, on which the small LM is trained, go to a file."""
    source, others = out / "leads.jsonl", out / "short-leads.json"
    write_leads(source)
    corpus = prepare(
        PrepareConfig(
            inputs=(str(source),),
            out=str(out / "corpus"),
            actions=ACTIONS,
            tokenizer=DEFAULT_LM,
            min_sentences=MIN_SENTENCES,
            validation_fraction=0.03,
            test_fraction=0.1,
            seed=seed,
        )
    )
    if not others.is_file():
        prepared = {title for split in corpus.manifest.splits for title in corpus.split(split)["id"]}
        texts = [text for title, text in leads().items() if title not in prepared]
        write_json(others, texts)


def _planner(out: Path, seed: int) -> dict[str, Any]:
    """Pre-train the planner, unless its metrics are there."""
    metrics = out / "planner" / "planner_metrics.json"
    if metrics.is_file():
        return read_json(metrics)
    return pretrain_planner(PlannerConfig(corpus=str(out / "corpus"), out=str(out / "planner"), seed=seed, resume=True))


def _tables(out: Path, seed: int) -> list[Table]:
    smol = Table(
        name="SmolLM2",
        title="SmolLM2-135M-Instruct, pre-trained, frozen",
        corpus=str(out / "corpus"),
        planner=str(out / "planner"),
        out=str(out / SMOL),
        lm=DEFAULT_LM,
        texts=None,
        source=str(out / "corpus"),
        training=SMOL_TRAINING,
        max_documents=80,
        seed=seed,
    )
    small = dataclasses.replace(
        smol,
        name="small LM",
        title="small LM: a GPT-2 of 4.5 million parameters, trained here for a few minutes, then frozen",
        corpus=str(out / "small-corpus"),
        out=str(out / "small"),
        lm=str(out / "small-lm"),
        texts=str(out / "short-leads.json"),
        training=SMALL_TRAINING,
        max_documents=None,
    )
    return [smol, small]


def _side_by_side(tables: Sequence[Table], out: Path) -> None:
    """Make each table in a process of its own, with an equal share of the cores.

    One thread each on two cores: neither waits for the other's threads at every operation.

    Raises:
        InputError, MachineError: a process failed; the other is stopped, and both go on at the next call.
    """
    threads = max(1, (os.cpu_count() or 1) // len(tables))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    last: dict[str, str] = {}
    try:
        for table in tables:
            settings = out / f"{Path(table.out).name}.json"
            write_json(settings, dataclasses.asdict(table))
            process = subprocess.Popen(
                [*python_module("planlm.quickstart.table"), str(settings)],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            processes.append(process)
            readers.append(threading.Thread(target=_forward, args=(process, table.name, last), daemon=True))
            readers[-1].start()
        while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
            time.sleep(0.2)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process, reader in zip(processes, readers, strict=False):
            process.wait()
            reader.join()
    for table, process in zip(tables, processes, strict=True):
        if process.returncode > 0:
            failure = InputError if process.returncode == 2 else MachineError
            raise failure(f"{table.name}: {last.get(table.name, 'failed').removeprefix('error: ')}")
    if any(process.returncode for process in processes):
        raise MachineError("a process was killed; call the quickstart again to go on")


def _forward(process: subprocess.Popen[str], name: str, last: dict[str, str]) -> None:
    """Show a process' lines under its name, and remember the last."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip():
            last[name] = line.strip()
            note(f"{name:>8} | {line.rstrip()}")


def _generation(out: Path, seed: int) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The prompt continued by SmolLM2 under soft plans, and the distinctive terms of the actions planned in it."""
    run = str(out / SMOL / KEPT)
    generation = generate(GenerateConfig(run=run, prompt=PROMPT, max_new_tokens=90, show_plan=True, seed=seed))
    planned = {action["action"] for sentence in generation["plan"] for action in sentence["actions"][:1]}
    described = describe_actions(ActionsConfig(corpus=str(out / "corpus")))
    return generation, {str(one.action): one.terms for one in described if one.action in planned}


def _pages(results: list[dict[str, Any]], tables: list[Table], out: Path) -> dict[str, list[str]]:
    """A plot and a page for each LM: perplexities under different tokenizers do not belong into one table."""
    paths: dict[str, list[str]] = {"plots": [], "reports": []}
    for result, table in zip(results, tables, strict=True):
        name = Path(table.out).name
        save_png(perplexity_figure(result), out / f"perplexity-{name}.png")
        runs = (str(out / "planner"), *map(str, table.runs()))
        page = write_report(ReportConfig(runs=runs, out=str(out / f"report-{name}.html")))
        paths["plots"].append(str(out / f"perplexity-{name}.png"))
        paths["reports"].append(str(page))
    return paths
