"""Generation metrics as text."""

from __future__ import annotations

import textwrap
from typing import Any

from planlm.report.tables import SHORT, align, ends, number

GENERATION_METRICS = (
    ("rouge2", "ROUGE-2", 4),
    ("edit_distance", "edit distance of actions", 3),
    ("edit_distance_normalised", "  normalised", 4),
    ("mauve", "MAUVE", 4),
    ("latent_perplexity", "latent perplexity", 2),
    ("distinct1", "distinct-1", 4),
    ("distinct2", "distinct-2", 4),
    ("distinct3", "distinct-3", 4),
    ("repetition", "repetition", 4),
    ("words", "words", 2),
    ("sentences", "sentences", 3),
)
"""Keys of the metrics, what they are called in front of readers, and decimals shown."""


def format_generation(result: dict[str, Any]) -> str:
    """The tables of `evaluate-generation`, below what they show, and in words where each plan helps.

    Args:
        result: what `planlm.evaluation.generation` returns.
    """
    parts = [textwrap.fill(describe_generation(result), 80), align(generation_cells(result), left=(0,))]
    for row in result["rows"]:
        if (differences := row["differences"]) is not None:
            cells = generation_difference_cells(differences)
            parts.append(f"{row['plan']} against {result['versus']}, with paired 95 % intervals over prompts:")
            parts += [align(cells, left=(0, 3)), "\n".join(_in_words(row["plan"], differences))]
    if "steering" in result:
        parts += [
            textwrap.fill(describe_steering(result["steering"]), 80),
            align(steering_cells(result["steering"]), left=(0,)),
        ]
    return "\n\n".join(parts)


def describe_generation(result: dict[str, Any]) -> str:
    """What the tables are about."""
    greedy = result["temperature"] == 0
    sampling = "greedy" if greedy else f"temperature {result['temperature']:g}, top-p {result['top_p']:g}"
    return (
        f"Continuations of {result['prompts']:,} documents of the {result['split']} split: {result['max_new_tokens']} "
        f"tokens behind {result['prompt_sentences']} sentences, {sampling}, seed {result['seed']}. MAUVE of "
        f"{result['clusters']} clusters, its features: {result['features']}."
    )


def generation_cells(result: dict[str, Any]) -> list[list[str]]:
    """A heading, and a row for each metric with its values under each plan and of people's own texts."""
    columns = [*(row["metrics"] for row in result["rows"]), result["human"]]
    heading = ["", *(row["plan"] for row in result["rows"]), "human"]
    return [
        heading,
        *([label, *(number(one[key], places) for one in columns)] for key, label, places in GENERATION_METRICS),
    ]


def generation_difference_cells(differences: dict[str, Any]) -> list[list[str]]:
    """Of each metric a plan's difference to the reference, with interval and verdict."""
    return [_cells(label, differences[key], places) for key, label, places in GENERATION_METRICS]


def describe_steering(steering: dict[str, Any]) -> str:
    """What the table of `--steer` is about."""
    attempts = steering.get("attempts", 1)
    tried = f", in {attempts} attempts at each sentence" if attempts > 1 else ""
    return (
        "Steering: an action was asked for of each sentence, drawn by the corpus's frequencies. Of complete sentences, "
        "the share that carry theirs, and the mean rank of its centroid (1: the nearest): texts that were generated "
        f"under the actions{tried}, texts that were not (both with selection {steering['selection']}), and chance. "
        "95 % intervals over prompts, those of the difference paired."
    )


def steering_cells(steering: dict[str, Any]) -> list[list[str]]:
    """A heading, and rows for both texts, their difference, and chance."""
    rows = [["", "carry it", "95 %", "mean rank", "95 %", "sentences"]]
    for name in ("steered", "unsteered", "difference"):
        row, sign = [name], "+" if name == "difference" else ""
        for of, places in (("hits", 3), ("ranks", 1)):
            row += [number(steering[of][name]["value"], places, sign), ends(steering[of][name]["ci95"], places, sign)]
        rows.append([*row, f"{steering['sentences'][name]:,}" if name in steering["sentences"] else "–"])
    return [
        *rows,
        ["chance", number(steering["hits"]["chance"], 3), "–", number(steering["ranks"]["chance"], 1), "–", "–"],
    ]


def _cells(label: str, difference: dict[str, Any], places: int) -> list[str]:
    return [
        label,
        number(difference["delta"], places, sign="+"),
        ends(difference["ci95"], places, "+"),
        SHORT.get(difference["verdict"], difference["verdict"]),
    ]


def _in_words(plan: str, differences: dict[str, Any]) -> list[str]:
    """Which metrics a plan makes better, which worse, and on which it has no measurable effect."""
    kinds: dict[str, list[str]] = {"better in": [], "worse in": [], "no measurable difference in": []}
    verdicts = {"better": 0, "nearer to human": 0, "worse": 1, "farther from human": 1}
    for key, label, _ in GENERATION_METRICS:
        said = differences[key]["verdict"]
        if differences[key]["ci95"] is not None:
            name = "normalised edit distance" if key == "edit_distance_normalised" else label
            list(kinds.values())[verdicts.get(said, 2)].append(name)
    lines = [f"{plan} is {what} {', '.join(names)}" for what, names in kinds.items() if names]
    return [textwrap.fill(line.replace("is no measurable", "makes no measurable"), 80) for line in lines]
