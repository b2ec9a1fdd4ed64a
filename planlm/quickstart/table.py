"""One table of the quickstart: one LM, trained and evaluated under one plan after another, in a process of its own.

`python -m planlm.quickstart.table SETTINGS.json` makes the rows that are not there yet; a row that was cut off goes
on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from planlm.config import EvaluateConfig, SmallLMConfig, TrainConfig
from planlm.corpus.store import PreparedCorpus
from planlm.evaluation.evaluate import evaluate
from planlm.evaluation.significance import DocumentScores, compare_rows
from planlm.experiments.small_lm import pretrain_lm, retokenize
from planlm.experiments.workers import exit_status
from planlm.report.results import EVALUATION
from planlm.terminal import note
from planlm.training.train import train

SPLIT = "test"
ROWS: dict[str, dict[str, Any]] = {
    "fixed": {"selection": "fixed"},
    "hard": {"selection": "hard"},
    "soft-frozen": {"selection": "soft", "freeze_planner": True},
    "soft-joint": {"selection": "soft"},
    "oracle": {"selection": "oracle"},
}
"""Run directories of a table: control, two-stage baseline, the method without and with joint training, upper bound."""

LABELS = {"hard": "hard (two-stage)", "soft-frozen": "soft, frozen planner", "soft-joint": "soft, joint"}
"""What a table calls them, where that is not the directory's name."""

KEPT = "soft-joint"
"""The run whose model stays on the disk; of the others the results do."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table's settings.

    Attributes:
        name, title: short, and as the table's heading.
        corpus, planner, out: folders; a run for each row is made in `out`.
        lm: name or folder.
        texts: JSON file with texts; a small LM is first trained on them and written to `lm`, and `corpus` made from
            `source` in its tokens. None for a pre-trained LM.
        source: the corpus that the planner was trained on.
        training: settings of `planlm train` that all rows share.
        max_documents: of the test split, or None for all.
        seed: of every row.
    """

    name: str
    title: str
    corpus: str
    planner: str
    out: str
    lm: str
    texts: str | None
    source: str
    training: Mapping[str, Any]
    max_documents: int | None
    seed: int

    def runs(self) -> list[Path]:
        """The run directories, in the table's order."""
        return [Path(self.out) / name for name in ROWS]


def make_rows(table: Table) -> None:
    """Train and evaluate every row, each under the plan it was trained with; `none` comes with the first."""
    if table.texts is not None:
        texts = json.loads(Path(table.texts).read_text(encoding="utf-8"))
        pretrain_lm(texts, Path(table.lm), SmallLMConfig(seed=table.seed))
        retokenize(PreparedCorpus.load(table.source), table.lm, Path(table.corpus))
    for number, (run, settings) in enumerate(zip(table.runs(), ROWS.values(), strict=True), start=1):
        if (run / EVALUATION).exists():
            continue
        note(f"row {number} of {len(ROWS)}: {run.name}")
        selection = settings["selection"]
        alike: dict[str, Any] = {"corpus": table.corpus, "seed": table.seed}
        train(
            TrainConfig(
                lm=table.lm, planner=table.planner, out=str(run), resume=True, **alike, **table.training, **settings
            )
        )
        evaluate(
            EvaluateConfig(
                run=str(run),
                split=SPLIT,
                plans=f"none,{selection}" if number == 1 else selection,
                versus=selection,
                window=table.training["window"],
                max_documents=table.max_documents,
                batch_size=16,
                precision="auto",
                **alike,
            )
        )
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        if run.name != KEPT:
            shutil.rmtree(run / "model", ignore_errors=True)


def collect(table: Table) -> dict[str, Any]:
    """The finished table.

    Returns:
        `title`, `rows` against `fixed` (see `compare_rows`) with `split`, `window`, `stride`, `tokens`, `documents`,
        `versus`, `trained_tokens` (of every row alike), and `joint`: joint training against each other row.
    """
    scores: dict[str, DocumentScores] = {}
    trained = set()
    for run, settings in zip(table.runs(), ROWS.values(), strict=True):
        result = json.loads((run / EVALUATION).read_text(encoding="utf-8"))[SPLIT]
        tokens = np.asarray(result["scores"]["tokens"])
        for plan, nll in result["scores"]["nll"].items():
            name = LABELS.get(run.name, run.name) if plan == settings["selection"] else plan
            scores[name] = DocumentScores(np.asarray(nll), tokens)
        trained.add(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["tokens"])
    assert len(trained) == 1, f"rows of {table.out} saw different numbers of tokens: {trained}"
    num_trained = trained.pop()
    joint = LABELS[KEPT]
    against = []
    for other in scores:
        if other != joint:
            row = compare_rows({other: scores[other], joint: scores[joint]}, other, seed=table.seed)[1]
            against.append({"versus": other, **{key: row[key] for key in ("delta", "ci95", "verdict")}})
    return {
        "title": f"{table.title}; every row but `none` trained on the same {num_trained:,} tokens",
        **{key: result[key] for key in ("split", "window", "stride", "tokens", "documents")},
        "versus": "fixed",
        "rows": compare_rows(scores, "fixed", seed=table.seed),
        "trained_tokens": num_trained,
        "joint": against,
    }


def main(path: str) -> int:
    """Make the rows of the table described in the JSON file `path`; the exit status, as the command line has it."""
    table = Table(**json.loads(Path(path).read_text(encoding="utf-8")))
    return exit_status(lambda: make_rows(table))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
