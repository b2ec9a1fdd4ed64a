"""Results as text for people; `--json` prints the same results for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from planlm import config


def corpus(result: Any, settings: config.PrepareConfig) -> str:
    """A prepared corpus: where it is, what is in its splits."""
    manifest = result.manifest
    lines = [
        f"{split}: {counts['documents']:,} documents, {counts['sentences']:,} sentences, {counts['tokens']:,} tokens"
        for split, counts in manifest.splits.items()
    ]
    lines.append(f"{manifest.num_actions:,} actions of {manifest.action_dim} dimensions from {manifest.encoder}")
    if manifest.left_out:
        lines.append(f"{manifest.left_out:,} documents left out: fewer than {settings.min_sentences} sentences")
    if aside := sum(source["skipped"] for source in manifest.sources):
        lines.append(f"{aside:,} files left aside")
    return "\n".join(
        [f"Prepared corpus in {result.path}", *lines, f"next: planlm pretrain-planner --corpus {result.path}"]
    )


def planner(result: dict[str, Any], settings: config.PlannerConfig) -> str:
    """A pre-trained planner's metrics on the validation split."""
    from planlm.report.tables import format_planner

    return f"{format_planner(result)}\n\nplanner in {result['run']}"


def training(result: dict[str, Any], settings: config.TrainConfig) -> str:
    """Where the model is and what the last step looked like."""
    return _pairs({key.replace("_", " "): value for key, value in result.items()})


def evaluation(result: dict[str, Any], settings: config.EvaluateConfig) -> str:
    """The table of perplexities and the planner's metrics."""
    from planlm.report.tables import format_planner, format_rows

    parts = [format_rows(result)]
    if result.get("planner"):
        parts.append(format_planner(result["planner"]))
    return "\n\n".join(parts)


def generation(result: dict[str, Any], settings: config.GenerateConfig) -> str:
    """Prompt and continuation; with `--show-plan` each sentence and what the planner expected of it."""
    parts = [result["prompt"] + result["text"]]
    if settings.show_plan:
        parts += [_planned_sentence(sentence) for sentence in result["plan"]]
    return "\n\n".join(parts)


def _planned_sentence(sentence: dict[str, Any]) -> str:
    likely = "  ".join(f"{action['action']} ({action['probability']:.1%})" for action in sentence["actions"])
    plan = (
        f"plan {sentence['forced']}, as asked; the planner's: {likely}"
        if sentence["forced"] is not None
        else f"plan {likely}"
    )
    return f"{plan}\n{textwrap.indent(textwrap.fill(sentence['sentence'], 100), '  ')}"


def actions(result: Any, settings: config.ActionsConfig) -> str:
    """Each action: its number, size, terms, and typical sentences."""
    return "\n\n".join(_action(description) for description in result)


def _action(description: Any) -> str:
    lines = [f"action {description.action}: {description.sentences:,} sentences ({description.share:.2%})"]
    lines.append(f"  {', '.join(description.terms)}")
    lines += [f"  - {textwrap.shorten(example, 160, placeholder=' ...')}" for example in description.examples]
    return "\n".join(lines)


def quickstart(result: dict[str, Any], settings: config.QuickstartConfig) -> str:
    """The tables, the planner, a text with its plan, and where everything is."""
    from planlm.report.tables import format_planner, format_rows

    parts = []
    for table in result["tables"]:
        parts.append(f"== {table['title']}\n{format_rows(table)}")
        parts.append("\n".join(_difference(row) for row in table["joint"]))
    parts.append(
        "Each row is a model trained and evaluated under its plan; `none` is the LM without one. Intervals cover the\n"
        "choice of documents, not of the seed. A plan that changes shows where sentences begin; `fixed` does not."
    )
    generation = result["generation"]
    parts += [f"== {format_planner(result['planner'])}", "== A text with its plan", generation["prompt"]]
    for sentence in generation["plan"]:
        terms = result["actions"].get(str(sentence["actions"][0]["action"]), [])
        parts.append(
            f"{_planned_sentence(sentence)}\n  (action {sentence['actions'][0]['action']}: {', '.join(terms)})"
        )
    paths = {name: ", ".join(path) if isinstance(path, list) else path for name, path in result["paths"].items()}
    parts += [f"== What was made\n{_pairs(paths)}", f"== Seconds\n{_pairs(result['seconds'])}"]
    return "\n\n".join(parts)


def _difference(row: dict[str, Any]) -> str:
    """How joint training compares with another row."""
    interval = "" if row["ci95"] is None else " [{:+.4f}, {:+.4f}]".format(*row["ci95"])
    return f"soft-joint against {row['versus']}: {row['delta']:+.4f} nats{interval}: {row['verdict']}"


def report(result: Any, settings: config.ReportConfig) -> str:
    """Where the page is."""
    return f"report in {result}"


def doctor(result: dict[str, Any], settings: config.DoctorConfig) -> str:
    """Sections of what was found."""
    return "\n\n".join(f"{name}\n{textwrap.indent(_pairs(found), '  ')}" for name, found in result.items())


def _pairs(result: Mapping[str, Any]) -> str:
    """One line for each entry, values below each other."""
    width = max(map(len, result))
    return "\n".join(f"{key:{width}}  {_value(value)}" for key, value in result.items())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)
