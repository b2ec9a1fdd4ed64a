"""From what was measured of continuations to a table: values, and differences between plans with intervals.

Legend: n prompts, R draws of prompts, A dimensions of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planlm.evaluation.generation_metrics import mauve
from planlm.evaluation.significance import bootstrap_interval, verdict
from planlm.progress import track

METRICS = {
    "rouge2": "more",
    "edit_distance": "less",
    "edit_distance_normalised": "less",
    "mauve": "more",
    "latent_perplexity": "human",
    "distinct1": "human",
    "distinct2": "human",
    "distinct3": "human",
    "repetition": "human",
    "words": "human",
    "sentences": "human",
}
"""Metrics in the tables' order, and which value is better: more, less, or the nearer to the true continuations'."""

MAUVE_PROMPTS = 20
"""Fewer texts make two clusters, which measure nothing."""

MAUVE_SEEDS = 10
"""Runs of k-means that MAUVE is the mean of: with a hundred texts the value of one run hangs on its seed."""

MAUVE_RESAMPLES = 200
"""Draws for MAUVE's interval at most: each costs two runs of k-means, .01 s each at 100 prompts and .05 s at 500."""


@dataclass(frozen=True)
class Continuations:
    """What was measured of n continuations.

    Attributes:
        per_prompt: by metric, float64 `[n]`.
        latent: NLL (nats) of each text's actions, and their number, float64 `[n]` each.
        features: of whole texts, float32 `[n, A]`.
    """

    per_prompt: dict[str, NDArray[np.float64]]
    latent: tuple[NDArray[np.float64], NDArray[np.float64]]
    features: NDArray[np.float32]


@dataclass(frozen=True)
class Following:
    """How n continuations follow the actions asked for, float64 `[n]` each.

    Attributes:
        hits: complete sentences whose nearest centroid is that of the action asked for.
        ranks: sum over complete sentences of that centroid's rank.
        complete: complete sentences.
    """

    hits: NDArray[np.float64]
    ranks: NDArray[np.float64]
    complete: NDArray[np.float64]

    @classmethod
    def of_ranks(cls, ranks: list[list[int]]) -> Following:
        """From the rank in each complete sentence of each text."""
        sums = [(sum(rank == 1 for rank in own), sum(own), len(own)) for own in ranks]
        return cls(*np.array(sums, dtype=np.float64).T)

    def mean(self, of: str, drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mean over the sentences of each draw of prompts `[R, n]`, `[R]`; `of` is `hits` or `ranks`."""
        total: NDArray[np.float64] = getattr(self, of)[drawn].sum(axis=1)
        return total / np.maximum(self.complete[drawn].sum(axis=1), 1)


def compare_following(
    steered: Following, unsteered: Following, frequencies: NDArray[np.float64], *, resamples: int, seed: int
) -> dict[str, Any]:
    """How much better texts follow the actions asked for than texts of the same prompts that do not know them.

    Args:
        steered: texts under the actions.
        unsteered: texts without.
        frequencies: by which the actions were drawn, `[K]`.
        resamples: draws of the bootstrap over prompts.
        seed: of the draws.

    Returns:
        `sentences` of both texts, and `hits` (share of complete sentences that carry their action) and `ranks` (mean
        rank of its centroid), each with `steered` and `unsteered` (`value`, `ci95`), `difference` (`value`, `ci95`,
        `verdict`) and `chance`: of a sentence as frequent as in the corpus, and of centroids in any order.
    """
    counts = {"steered": int(steered.complete.sum()), "unsteered": int(unsteered.complete.sum())}
    chance = {"hits": float(np.square(frequencies).sum()), "ranks": (len(frequencies) + 1) / 2}
    found: dict[str, Any] = {"sentences": counts}
    for of, by_chance in chance.items():
        statistics = {
            "steered": lambda drawn, of=of: steered.mean(of, drawn),
            "unsteered": lambda drawn, of=of: unsteered.mean(of, drawn),
            "difference": lambda drawn, of=of: steered.mean(of, drawn) - unsteered.mean(of, drawn),
        }
        found[of] = {name: with_interval(one, len(steered.hits), resamples, seed) for name, one in statistics.items()}
        found[of]["chance"] = by_chance
        delta, interval = found[of]["difference"].values()
        sign = -1 if of == "hits" else 1  # more hits and lower ranks are better
        turned = (
            None if interval is None else (min(sign * end for end in interval), max(sign * end for end in interval))
        )
        found[of]["difference"]["verdict"] = verdict(sign * delta, turned)
    return found


def with_interval(
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], num_prompts: int, resamples: int, seed: int
) -> dict[str, Any]:
    """`value` of a statistic of all prompts, and `ci95`; arguments as of `significance.bootstrap_interval`."""
    interval = bootstrap_interval(statistic, num_prompts, resamples=resamples, seed=seed)
    value = float(statistic(np.arange(num_prompts)[None])[0])
    return {"value": value, "ci95": None if interval is None else list(interval)}


def make_rows(
    measured: dict[str, Continuations], human: Continuations, versus: str, *, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """The rows of a table.

    Args:
        measured: by plan, in the table's order.
        human: the true continuations.
        versus: the plan that differences refer to.
        resamples: draws of the bootstrap over prompts.
        seed: of the draws, and of k-means.

    Returns:
        One dictionary a plan: `plan`, `metrics` (see `values`) and `differences`, by metric `delta`, `ci95` (None where
        it is undefined) and `verdict`; None for `versus`.
    """
    own = values(human, None, seed)
    found = {plan: values(one, human, seed) for plan, one in measured.items()}
    rows: list[dict[str, Any]] = []
    for plan, one in measured.items():
        differences = None
        if plan != versus:
            pair = (one, measured[versus], human)
            differences = {
                name: compare(name, value, found[versus][name], own[name], _interval(name, pair, resamples, seed))
                for name, value in found[plan].items()
            }
        rows.append({"plan": plan, "metrics": found[plan], "differences": differences})
    return rows


def values(texts: Continuations, human: Continuations | None, seed: int) -> dict[str, float | None]:
    """Every metric of some continuations; None where it is not defined, as for the true ones (`human` None)."""
    everything = np.arange(len(texts.features))[None]
    found: dict[str, float | None] = {}
    for name in METRICS:
        runs = MAUVE_SEEDS if name == "mauve" else 1
        is_defined = _is_defined(name, texts, human)
        found[name] = float(_draw(name, texts, human, everything.repeat(runs, 0), seed).mean()) if is_defined else None
    return found


def compare(
    name: str, value: float | None, reference: float | None, human: float | None, interval: tuple[float, float] | None
) -> dict[str, Any]:
    """A metric's difference to that of another plan, and what it means in words.

    Args:
        name: of `METRICS`.
        value: the plan's.
        reference: the other plan's.
        human: the true continuations'.
        interval: 95 %, of the difference.
    """
    if value is None or reference is None:
        return {"delta": None, "ci95": None, "verdict": "not measured"}
    delta, best = value - reference, METRICS[name]
    if best == "more":
        said = verdict(-delta, None if interval is None else (-interval[1], -interval[0]))
    else:
        said = verdict(delta, interval)
    if best == "human" and said in ("better", "worse") and human is not None:
        said = "nearer to human" if abs(value - human) < abs(reference - human) else "farther from human"
    return {"delta": delta, "ci95": None if interval is None else list(interval), "verdict": said}


def _is_defined(name: str, texts: Continuations, human: Continuations | None) -> bool:
    if name == "mauve":
        return human is not None and len(texts.features) >= MAUVE_PROMPTS
    return name == "latent_perplexity" or name in texts.per_prompt


def _interval(
    name: str, pair: tuple[Continuations, Continuations, Continuations], resamples: int, seed: int
) -> tuple[float, float] | None:
    """Interval of the difference between the first and the second of `pair`; the third are the true continuations."""
    one, other, human = pair
    if not _is_defined(name, one, human):
        return None
    return bootstrap_interval(
        lambda drawn: _draw(name, one, human, drawn, seed) - _draw(name, other, human, drawn, seed),
        len(one.features),
        resamples=min(resamples, MAUVE_RESAMPLES) if name == "mauve" else resamples,
        seed=seed,
    )


def _draw(
    name: str, texts: Continuations, human: Continuations | None, drawn: NDArray[np.int64], seed: int
) -> NDArray[np.float64]:
    """A metric over the prompts of each draw, `[R, n]` to `[R]`; MAUVE begins each draw's k-means with another seed."""
    if name == "mauve":
        assert human is not None
        pairs = track(list(drawn), "MAUVE", len(drawn), "draws")
        return np.array([mauve(texts.features[i], human.features[i], seed + run) for run, i in enumerate(pairs)])
    if name == "latent_perplexity":
        nll, count = (part[drawn].sum(axis=1) for part in texts.latent)
        return np.exp(nll / np.maximum(count, 1))
    return texts.per_prompt[name][drawn].mean(axis=1)
