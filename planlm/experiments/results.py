"""From records of finished cells to `results.json`, `tables.md` and plots; what is missing is named.

Two tests stand beside each other: a paired bootstrap over documents, of scores averaged over seeds, and a paired t-test
over seeds, of mean differences over documents. The first covers the choice of documents, the second that of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit  # type: ignore[import-untyped]

from planlm import __version__
from planlm.errors import InputError
from planlm.evaluation.breakdown import SplitScores, by_length, by_position
from planlm.evaluation.significance import DocumentScores, compare_rows
from planlm.experiments.pages import figure_name, tables, write_plots
from planlm.experiments.spec import Backbone, Curve, Experiment, Row
from planlm.experiments.tasks import Planned, Store
from planlm.files import write_json, write_text

RESULTS, TABLES = "results.json", "tables.md"

RESAMPLES = 500
"""Of the bootstrap by sentence and length, which is drawn anew after every cell."""

Scores = dict[int, DocumentScores]
"""Of one row under one plan, by seed."""

COST = ("tokens", "seconds", "tokens_per_second", "memory")
"""Of training: tokens with a label, seconds, bytes at the peak, elements of tensors that are not the LM's."""


def check_budgets(planned: Planned, store: Store) -> None:
    """Refuse rows that were trained on unequal numbers of tokens, unless they say why.

    Raises:
        InputError: names two of them.
    """
    for (backbone, seed), rows in planned.budgets.items():
        tokens = {row: record["result"]["tokens"] for row, key in rows.items() if (record := store.record(key))}
        if len(set(tokens.values())) > 1:
            least, most = min(tokens, key=tokens.__getitem__), max(tokens, key=tokens.__getitem__)
            raise InputError(
                f"{backbone}, seed {seed}: row {least} was trained on {tokens[least]:,} tokens and row {most} on "
                f"{tokens[most]:,}; give both the same budget, or one of them own_budget: REASON"
            )


def write_results(experiment: Experiment, planned: Planned, store: Store) -> None:
    """Write `results.json`, `tables.md` and the plots from what is there."""
    results = collect(experiment, planned, store)
    write_json(store.out / RESULTS, results)
    write_text(store.out / TABLES, tables(results))
    write_plots(results, store.out)


def collect(experiment: Experiment, planned: Planned, store: Store) -> dict[str, Any]:
    """All results that there are; docs/experiments.md has their names."""
    missing = [
        f"{backbone.name}: {row}, seed {seed}"
        for seed in experiment.seeds
        for backbone in experiment.backbones
        for row in experiment.rows
        if store.record(planned.reported.get((backbone.name, row, seed), "")) is None
    ]
    found = {
        backbone.name: _Backbone(experiment, backbone, planned, store).collect() for backbone in experiment.backbones
    }
    return {
        "name": experiment.name,
        "title": experiment.title,
        "version": __version__,
        "seeds": list(experiment.seeds),
        "versus": experiment.versus,
        "backbones": found,
        "missing": missing,
    }


class _Backbone:
    """The results of one LM."""

    def __init__(self, experiment: Experiment, backbone: Backbone, planned: Planned, store: Store) -> None:
        self.experiment, self.backbone, self.planned, self.store = experiment, backbone, planned, store
        self._records = {
            row: {
                seed: record
                for seed in experiment.seeds
                if (record := store.record(planned.reported.get((backbone.name, row, seed), ""))) is not None
            }
            for row in experiment.rows
        }

    def collect(self) -> dict[str, Any]:
        """Rows, comparisons and curves."""
        rows = {row.name: self._row(row) for row in self.experiment.rows.values() if self._records[row.name]}
        compared = []
        for left, right in self.experiment.compare:
            scores = [self._scores(*self.experiment.side(side)) for side in (left, right)]
            if set(scores[0]) & set(scores[1]):
                compared.append({"row": left, "versus": right, **_compare(*scores)})
        return {
            "rows": rows,
            "compare": compared,
            **self._breakdown(),
            "curves": {curve.name: self._curve(curve) for curve in self.experiment.curves},
        }

    def _scores(self, row: Row, plan: str) -> Scores:
        found = {}
        for seed, record in self._records[row.name].items():
            kept = record["result"]["scores"]
            found[seed] = DocumentScores(np.asarray(kept["nll"][plan]), np.asarray(kept["tokens"]))
        return found

    def _breakdown(self) -> dict[str, Any]:
        """Rows by sentence and by length of documents against the reference (see `planlm.evaluation.breakdown`).

        Of scores averaged over seeds, with intervals over documents; nothing while the reference is missing.
        """
        reference, plan = self.experiment.side(self.experiment.versus)
        versus = figure_name(reference.label, reference.plans, plan)
        averaged = {}
        for row in self.experiment.rows.values():
            for plan in row.plans:
                kept = [record["result"]["scores"] for record in self._records[row.name].values()]
                if kept and all("position_nll" in each for each in kept):
                    averaged[figure_name(row.label, row.plans, plan)] = SplitScores(
                        np.mean([each["nll"][plan] for each in kept], axis=0),
                        np.asarray(kept[0]["tokens"]),
                        np.mean([each["position_nll"][plan] for each in kept], axis=0),
                        np.asarray(kept[0]["position_tokens"]),
                        seconds=0.0,
                    )
        if versus not in averaged:
            return {}
        alike = {
            name: scores for name, scores in averaged.items() if np.array_equal(scores.tokens, averaged[versus].tokens)
        }
        how: dict[str, Any] = {"resamples": RESAMPLES, "seed": 0}
        return {"by_position": by_position(alike, versus, **how), "by_length": by_length(alike, versus, **how)}

    def _row(self, row: Row) -> dict[str, Any]:
        """A row under each of its plans, against the reference; what it cost, and what was chosen for it."""
        records = self._records[row.name]
        reference = self._scores(*self.experiment.side(self.experiment.versus))
        plans = {}
        for plan in row.plans:
            scores = self._scores(row, plan)
            nll = [score.nll for score in scores.values()]
            both = set(scores) & set(reference)
            plans[plan] = {
                "nll": float(np.mean(nll)),
                "nll_sd": float(np.std(nll, ddof=1)) if len(nll) > 1 else None,
                "perplexity": math.exp(float(np.mean(nll))),
                "by_seed": {str(seed): score.nll for seed, score in scores.items()},
                "versus": _compare(scores, reference) if both else None,
                "is_reference": self.experiment.side(self.experiment.versus) == (row, plan),
            }
        first = next(iter(records.values()))["result"]
        forgetting = _averaged([record["result"].get("forgetting") for record in records.values()])
        if forgetting is not None:  # a folder is called by its key
            forgetting["corpus"] = self.experiment.evaluate_options(self.backbone, row, {})["forgetting"]
        trained = [record["result"] for record in self._trained(row)]
        planners = [record["result"]["planner"] for record in records.values() if record["result"].get("planner")]
        return {
            "label": row.label,
            "plans": plans,
            **{name: first[name] for name in ("split", "window", "stride", "documents", "tokens")},
            "model_of": row.model_of,
            "own_budget": self.experiment.base(row).own_budget,
            "chosen": self.planned.chosen.get((self.backbone.name, row.name)),
            "device": trained[0].get("device") if trained else None,
            "cost": {
                **{name: _mean(result.get(name) for result in trained) for name in COST},
                "parameters_added": sum(size for part, size in first["cost"]["parameters"].items() if part != "lm"),
            },
            "planner": {
                name: _mean(each.get(name) for each in planners)
                for name, value in (planners[0] if planners else {}).items()
                if isinstance(value, int | float)
            },
            "forgetting": forgetting,
            "read": {str(seed): record["began"] for seed, record in records.items()},
        }

    def _trained(self, row: Row) -> list[dict[str, Any]]:
        keys = (self.planned.trains.get((self.backbone.name, row.name, seed), "") for seed in self.experiment.seeds)
        return [record for key in keys if (record := self.store.record(key)) is not None]

    def _curve(self, curve: Curve) -> dict[str, Any]:
        """For each plan the points of a sweep: its value, the mean NLL, and the difference to the reference by seed."""
        rows = [row for row in self.experiment.rows.values() if row.sweep == curve.rows and self._records[row.name]]
        reference = self._scores(*self.experiment.side(self.experiment.versus))
        lines = {}
        for plan in curve.plans or (rows[0].plans if rows else ()):
            points: list[dict[str, Any]] = []
            for row in rows:
                nll = {seed: score.nll for seed, score in self._scores(row, plan).items()}
                delta = [each - reference[seed].nll for seed, each in nll.items() if seed in reference]
                if delta:
                    points.append(
                        {
                            "x": row.value,
                            "nll": _mean(nll.values()),
                            "delta": _mean(delta),
                            "half_width": _half_width(delta),
                        }
                    )
            lines[plan] = sorted(points, key=lambda point: point["x"])
        return {"x": curve.x, "versus": self.experiment.versus, "lines": lines}


def _compare(scores: Scores, reference: Scores) -> dict[str, Any]:
    """The difference of two rows over the seeds that both have, tested over documents and over seeds.

    Returns:
        `delta` (nats per token, negative is better), `ci95` and `verdict` over documents (see `compare_rows`); of seeds
        their number, `by_seed`, `lower` (on how many the first row is lower), and over them `seeds_ci95`, `t` and `p`
        (two-sided), None below two. `problem` stands in place of all where the two scored other tokens.
    """
    seeds = sorted(set(scores) & set(reference))
    try:
        averaged = {
            name: DocumentScores(np.mean([each[seed].nll_sum for seed in seeds], axis=0), each[seeds[0]].tokens)
            for name, each in (("reference", reference), ("row", scores))
        }
        row = compare_rows(averaged, "reference")[1]
    except ValueError:
        return {"problem": "the two rows have scored other tokens", "seeds": len(seeds)}
    differences = np.array([scores[seed].nll - reference[seed].nll for seed in seeds])
    half = _half_width(differences)
    mean, t, p = float(differences.mean()), None, None
    if half:
        t = mean / (float(differences.std(ddof=1)) / math.sqrt(len(seeds)))
        p = 2 * float(stdtr(len(seeds) - 1, -abs(t)))
    return {
        "delta": row["delta"],
        "ci95": row["ci95"],
        "verdict": row["verdict"],
        "seeds": len(seeds),
        "by_seed": {str(seed): float(each) for seed, each in zip(seeds, differences, strict=True)},
        "lower": int((differences < 0).sum()),
        "seeds_ci95": [mean - half, mean + half] if half else None,
        "t": t,
        "p": p,
    }


def _half_width(values: Any) -> float | None:
    """Half the width of the 95 % interval of a mean, by Student's t; None below two values."""
    if len(values) < 2:
        return None
    return float(-stdtrit(len(values) - 1, 0.025) * np.std(values, ddof=1) / math.sqrt(len(values)))


def _mean(values: Iterable[Any]) -> float | None:
    numbers = [value for value in values if isinstance(value, int | float)]
    return sum(numbers) / len(numbers) if numbers else None


def _averaged(found: list[Any]) -> Any:
    """Mean over seeds of the numbers in results of the same shape; None where there are none."""
    found = [each for each in found if each is not None]
    if not found:
        return None
    first = found[0]
    if isinstance(first, dict):
        return {name: _averaged([each.get(name) for each in found]) for name in first}
    if isinstance(first, list):
        return [_averaged(list(each)) for each in zip(*found, strict=False)]
    is_number = isinstance(first, int | float) and not isinstance(first, bool)
    return _mean(found) if is_number else first
