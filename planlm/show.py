"""Results as text for people; `--json` prints the same results for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from planlm import config
from planlm.labels import show_action
from planlm.report.audit import format_audit, format_probe
from planlm.report.budget import format_budget
from planlm.report.generation import format_generation
from planlm.report.tables import (
    align,
    difference_cells,
    format_breakdown,
    format_cost,
    format_forgetting,
    format_planner,
    format_rows,
)


def corpus(result: Any, settings: config.PrepareConfig) -> str:
    """A prepared corpus: where it is, what is in its splits."""
    manifest = result.manifest
    lines = [f"Prepared corpus in {result.path}"]
    lines += [
        f"{split}: {counts['documents']:,} documents, {counts['sentences']:,} sentences, {counts['tokens']:,} tokens"
        for split, counts in manifest.splits.items()
    ]
    lines.append(f"{manifest.num_actions:,} actions of {manifest.action_dim} dimensions from {manifest.encoder}")
    if manifest.left_out:
        lines.append(f"{manifest.left_out:,} documents left out: fewer than {settings.min_sentences} sentences")
    if aside := sum(source["skipped"] for source in manifest.sources):
        lines.append(f"{aside:,} files left aside")
    return "\n".join([*lines, f"next: planlm pretrain-planner --corpus {result.path}"])


def planner(result: dict[str, Any], settings: config.PlannerConfig) -> str:
    """A pre-trained planner's metrics on the validation split."""
    step = f", of step {result['best_step']:,}" if "best_step" in result else ""
    return f"{format_planner(result)}\n\nplanner in {result['run']}{step}"


def training(result: dict[str, Any], settings: config.TrainConfig) -> str:
    """Where the model is and what the last step looked like; of a dry run its table."""
    if settings.dry_run:
        return _dry_run(result)
    return _pairs({key.replace("_", " "): value for key, value in result.items()})


def _dry_run(result: dict[str, Any]) -> str:
    """What a run would cost."""
    windows, sentences = (" × ".join(map(str, result[name])) for name in ("windows", "sentences"))
    memory = result["memory"]
    return _pairs(
        {
            "a batch: windows × tokens": windows,
            "segments (sentences as windows show them)": result["segments"],
            "the planner's rows × sentences × dimensions": sentences,
            **{f"weights trained: {name}": size for name, size in result["trained"].items()},
            "weights not trained": result["not_trained"],
            "steps": result["steps"],
            "tokens predicted": result["tokens"],
            "seconds a step": result["seconds_per_step"],
            "hours in all": result["seconds"] / 3600,
            "peak memory, GB": "unknown" if memory is None else memory / 1e9,
        }
    )


def budget(result: dict[str, Any], settings: config.PlanBudgetConfig) -> str:
    """What a run would take, measured here and predicted for GPUs."""
    return format_budget(result)


def evaluation(result: dict[str, Any], settings: config.EvaluateConfig) -> str:
    """The table of perplexities, where the differences arise, what planning costs, and the planner's metrics."""
    parts = [format_rows(result), format_breakdown(result)]
    parts += [format_cost(result["cost"])] if "cost" in result else []
    parts += [format_forgetting(result["forgetting"])] if "forgetting" in result else []
    parts += [format_planner(result["planner"])] if result.get("planner") else []
    return "\n\n".join(filter(None, parts))


def generation_evaluation(result: dict[str, Any], settings: config.EvaluateGenerationConfig) -> str:
    """The table of generation metrics, and where each plan helps."""
    return format_generation(result)


def generation(result: dict[str, Any], settings: config.GenerateConfig) -> str:
    """Prompt and continuations, with `--show-plan` each sentence's plan; of a file all, or where they are."""
    if "out" in result:
        return f"{result['prompts']:,} results in {result['out']}"
    if "results" in result:
        texts = [_generated(one, settings) for one in result["results"]]
        names = [one.get("id", number) for number, one in enumerate(result["results"], 1)]
        return "\n\n".join(f"== {name}\n{text}" for name, text in zip(names, texts, strict=True))
    return _generated(result, settings)


def audit(result: dict[str, Any], settings: config.AuditConfig) -> str:
    """Drift, certainty and repetition."""
    return format_audit(result)


def audit_probe(result: dict[str, Any], settings: config.AuditProbeConfig) -> str:
    """What names of each two groups differ in."""
    return format_probe(result)


def _generated(result: dict[str, Any], settings: config.GenerateConfig) -> str:
    parts = []
    for number, one in enumerate(result.get("candidates", [result]), 1):
        if "score" in one:
            score = "no token" if one["score"] is None else f"{one['score']:.3f} nats a token"
            parts.append(f"-- {number}: {score}")
        parts.append(result["prompt"] + one["text"])
        parts += [_planned_sentence(sentence) for sentence in one["plan"]] if settings.show_plan else []
    return "\n\n".join(parts)


def _planned_sentence(sentence: dict[str, Any]) -> str:
    actions = [f"{_named(action)} {action['probability']:.1%}" for action in sentence["actions"]]
    likely = "  ".join(actions) or "(this selection asks no planner)"
    how = next(
        (word for kind, word in (("forced", "as asked"), ("drawn", "drawn")) if sentence.get(kind) is not None), None
    )
    if how is not None and sentence.get("carried") is not None:
        how += ", and carried" if sentence["carried"] == sentence["action"] else f", and carries {sentence['carried']}"
    decided = "" if how is None else f"{_named(sentence)}, {how}; the planner's: "
    return f"plan {decided}{likely}\n{textwrap.indent(textwrap.fill(sentence['sentence'], 78), '  ')}"


def _named(what: dict[str, Any]) -> str:
    """`12 (birth and family)`, or `12` without a label."""
    return show_action(what["action"], {what["action"]: what["label"]} if what["label"] else None)


def actions(result: Any, settings: config.ActionsConfig) -> str:
    """Each action: its number and label, size, terms, sentences, places, and what follows it."""
    labels = {one.action: one.label for one in result}
    return "\n\n".join("\n".join(_described(one, labels)) for one in result)


def _described(one: Any, labels: Mapping[int, str]) -> Iterator[str]:
    def named(action: int) -> str:
        return show_action(action, {action: labels.get(action, "")})

    yield f"action {named(one.action)}: {one.sentences:,} sentences ({one.share:.2%})"
    yield f"  terms: {', '.join(one.terms)}"
    yield f"  in the fifths of a document: {' '.join(f'{share:.0%}' for share in one.places)}"
    if one.followed_by:
        yield f"  followed by: {', '.join(f'{named(then.action)} {then.share:.0%}' for then in one.followed_by)}"
    yield from (f"  - {_short(example)}" for example in one.examples)
    yield from (f"  ~ {_short(example.text)} [or {named(example.other)}]" for example in one.borderline)


def _short(sentence: str) -> str:
    return textwrap.shorten(sentence, 160, placeholder=" ...")


def quickstart(result: dict[str, Any], settings: config.QuickstartConfig) -> str:
    """The tables, the planner, a text with its plan, and where everything is."""
    parts = []
    for table in result["tables"]:
        parts.append(f"== {textwrap.fill(table['title'], 77)}\n{format_rows(table)}")
        joint = [[row["versus"], *difference_cells(row)] for row in table["joint"]]
        parts.append(f"soft, joint, against the other rows:\n{align(joint, left=(0, 3))}")
    parts.append(
        "Each row is a model trained and evaluated under its plan; `none` is the LM\n"
        "without one. Intervals cover the choice of documents, not of the seed. A plan\n"
        "that changes shows where sentences begin; `fixed` does not."
    )
    generation = result["generation"]
    parts += [f"== {format_planner(result['planner'])}", "== A text with its plan", generation["prompt"]]
    for sentence in generation["plan"]:
        action = sentence["actions"][0]["action"]
        terms = ", ".join(result["actions"].get(str(action), []))
        parts.append(f"{_planned_sentence(sentence)}\n  (action {action}: {terms})")
    paths = {name: ", ".join(path) if isinstance(path, list) else path for name, path in result["paths"].items()}
    parts += [f"== What was made\n{_pairs(paths)}", f"== Seconds\n{_pairs(result['seconds'])}"]
    return "\n\n".join(parts)


def experiment(result: dict[str, Any], settings: config.ExperimentConfig) -> str:
    """The tables, and where they and the plots are."""
    return f"{result['tables']}\n{_pairs(result['paths'])}"


def report(result: Any, settings: config.ReportConfig) -> str:
    """Where the page is."""
    return f"report in {result}"


def doctor(result: dict[str, Any], settings: config.DoctorConfig) -> str:
    """Sections of what was found."""
    return "\n\n".join(f"{name}\n{textwrap.indent(_pairs(found), '  ')}" for name, found in result.items())


def _pairs(result: Mapping[str, Any]) -> str:
    """One line for each entry, values below each other."""
    return align([(key, _value(value)) for key, value in result.items()], left=(0, 1))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if isinstance(value, float) else str(value)
