"""An experiment's YAML file, read and checked (docs/experiments.md): options are those of the commands they go to."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from planlm.config import (
    PLANNER_INPUTS,
    CommandConfig,
    EvaluateConfig,
    PlannerConfig,
    PrepareConfig,
    SmallLMConfig,
    TrainConfig,
)
from planlm.errors import InputError
from planlm.evaluation.evaluate import parse_plans, plans_problem
from planlm.evaluation.perplexity import SAMPLED
from planlm.experiments.pages import PLOTS, figure_name, plot_name
from planlm.experiments.section import OURS, Section, as_option, names_of, shown
from planlm.flat_yaml import read_nested
from planlm.selections import SELECTIONS
from planlm.settings import SEED, as_kind
from planlm.training.train import check_settings

Config = TypeVar("Config", bound=CommandConfig)

BUDGET = ("steps", "epochs", "batch_size", "accumulate", "window")
"""Options that decide how many tokens a row is trained on."""

CORPUS_OPTIONS = ("rehearsal", "forgetting")
"""Options of train and evaluate that name another corpus."""

MOST_CELLS = 100_000

SPLITS = ("test", "validation")
"""What rows may be compared on."""


@dataclass(frozen=True)
class Backbone:
    """An LM: `lm` names one, or `pretrain` says how to train one here, and `pretrain_corpus` on what."""

    name: str
    lm: str | None
    pretrain: SmallLMConfig | None
    pretrain_corpus: str
    train: dict[str, Any]
    evaluate: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A way to train and evaluate.

    Attributes:
        name, label: in the file, and in tables.
        train, evaluate: options beyond those that all rows share.
        plans: selections to evaluate, the row's own first.
        grid: values of options, of which validation chooses.
        model_of: the row whose model is evaluated, in place of training one.
        planner: options beyond those that all planners share; None for a planner that starts untrained.
        own_budget: why the row is trained on another number of tokens.
        sweep, value: the row that this one stands for a value of.
    """

    name: str
    label: str
    train: dict[str, Any]
    evaluate: dict[str, Any]
    plans: tuple[str, ...]
    grid: dict[str, list[Any]]
    model_of: str | None
    planner: dict[str, Any] | None
    own_budget: str | None
    sweep: str | None = None
    value: float | None = None

    def candidates(self) -> list[dict[str, Any]]:
        """Every combination of the grid's values; one without any where there is no grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


@dataclass(frozen=True)
class Curve:
    """A figure of the values of a sweep: a line for each plan of its rows."""

    name: str
    rows: str
    plans: tuple[str, ...]
    x: str


@dataclass(frozen=True)
class Experiment:
    """What the file says; see docs/experiments.md."""

    name: str
    title: str
    split: str
    corpus: str | None
    prepare: dict[str, Any] | None
    corpora: dict[str, dict[str, Any]]
    planner: dict[str, Any]
    planner_per_seed: bool
    backbones: tuple[Backbone, ...]
    seeds: tuple[int, ...]
    tune_seeds: tuple[int, ...]
    train: dict[str, Any]
    evaluate: dict[str, Any]
    rows: dict[str, Row]
    versus: str
    compare: tuple[tuple[str, str], ...]
    curves: tuple[Curve, ...]
    keep: tuple[str, ...]

    def base(self, row: Row) -> Row:
        """The row that trains the model which `row` evaluates."""
        return self.rows[row.model_of] if row.model_of else row

    def side(self, name: str) -> tuple[Row, str]:
        """The row and plan of `row` or `row/plan`."""
        row, _, plan = name.partition("/")
        return self.rows[row], plan or self.rows[row].plans[0]

    def train_options(self, backbone: Backbone, row: Row, values: dict[str, Any]) -> dict[str, Any]:
        """Options of `train` for a cell; `values` are the grid's."""
        return {**self.train, **backbone.train, **row.train, **_of(TrainConfig, values)}

    def evaluate_options(self, backbone: Backbone, row: Row, values: dict[str, Any]) -> dict[str, Any]:
        """Options of `evaluate` for a cell; `values` are the grid's, which go to training where they can."""
        rest = values if row.model_of else {k: v for k, v in values.items() if k not in names_of(TrainConfig)}
        options = {**self.evaluate, **backbone.evaluate, **row.evaluate, **rest}
        return {**options, "plans": ",".join(row.plans), "versus": row.plans[0]}


def read_experiment(path: Path) -> Experiment:
    """Read and check a file.

    Raises:
        InputError: names the file and, in it, what is wrong.
    """
    top = Section(str(path), read_nested(path))
    name = top.take("name", str, path.stem)
    if not name or "/" in name or name.startswith("."):
        raise InputError(f"{path}: name: expected what can be a folder's name, got {name!r}")
    seeds = _seeds(str(path), top.take("seeds", list, [0]))
    planner: Section = top.take("planner", dict, Section(str(path), {}))
    planner_per_seed = planner.take("per_seed", bool, True)
    train = top.take("train", dict, Section(str(path), {})).options(TrainConfig)
    rows = dict(_rows(path, top, train.get("selection", TrainConfig.selection)))
    split = top.take("split", str, SPLITS[0])
    if split not in SPLITS:
        raise InputError(f"{path}: split: expected {' or '.join(SPLITS)}, got {split}")
    if gridded := [row.name for row in rows.values() if row.grid and split == "validation"]:
        raise InputError(
            f"{path}: row {gridded[0]} has a grid, of which validation chooses, and split: validation compares on the "
            "same documents; use sweep, or a row for each value"
        )
    tune = top.take("tune_seeds", str, "first")
    if tune not in ("first", "all"):
        raise InputError(f"{path}: tune_seeds: expected first or all, got {tune}")
    found = Experiment(
        name=name,
        title=top.take("title", str, name),
        split=split,
        corpus=top.take("corpus", str),
        prepare=_prepare(top),
        corpora={given: _corpus(f"{path}: corpora: {given}", value) for given, value in top.names("corpora")},
        planner=planner.options(PlannerConfig),
        planner_per_seed=planner_per_seed,
        backbones=tuple(_backbone(f"{path}: backbones: {given}", given, v) for given, v in top.names("backbones")),
        seeds=seeds,
        tune_seeds=seeds if tune == "all" else seeds[:1],
        train=train,
        evaluate=top.take("evaluate", dict, Section(str(path), {})).options(EvaluateConfig),
        rows=rows,
        versus=top.take("versus", str, next(iter(rows), "")),
        compare=tuple(_pairs(str(path), top.take("compare", list, []))),
        curves=tuple(_curve(f"{path}: curves: {given}", given, value) for given, value in top.names("curves")),
        keep=tuple(map(str, top.take("keep", list, []))),
    )
    top.done()
    _check(path, found)
    return found


def _prepare(top: Section) -> dict[str, Any] | None:
    """Options of `prepare`, `inputs` among them."""
    section = top.take("prepare", dict)
    if section is None:
        return None
    options = section.options(PrepareConfig)
    if "inputs" not in options:
        raise InputError(f"{section.where}: missing inputs")
    return options


def _corpus(where: str, content: Any) -> dict[str, Any]:
    section = Section(where, content)
    found = {"corpus": section.take("corpus", str), "prepare": _prepare(section)}
    section.done()
    if found["corpus"] is None and found["prepare"] is None:
        raise InputError(f"{where}: missing corpus, the folder of one, or prepare")
    return found


def _backbone(where: str, name: str, content: Any) -> Backbone:
    section = Section(where, content)
    pretrain: Section | None = section.take("pretrain", dict)
    corpus = pretrain.take("corpus", str, "") if pretrain else ""
    found = Backbone(
        name,
        section.take("lm", str),
        _build(SmallLMConfig, pretrain.where, _with_seed(pretrain)) if pretrain else None,
        corpus,
        section.take("train", dict, Section(where, {})).options(TrainConfig),
        section.take("evaluate", dict, Section(where, {})).options(EvaluateConfig),
    )
    section.done()
    if (found.lm is None) == (found.pretrain is None):
        raise InputError(f"{where}: expected either lm, a name or folder, or pretrain")
    if "selection" in found.train:
        raise InputError(f"{where}: train: selection: belongs to rows, which are compared over all LMs; set it there")
    return found


def _with_seed(section: Section) -> dict[str, Any]:
    seed = section.take("seed", int, 0)
    return {**section.options(SmallLMConfig), "seed": seed}


def _rows(path: Path, top: Section, selection: str) -> Iterator[tuple[str, Row]]:
    """The rows by name, trained with `selection` unless they say; a sweep is a row for each value, `name=value`."""
    for name, content in top.names("rows"):
        where = f"{path}: rows: {name}"
        if "/" in name or "=" in name:
            raise InputError(f"{where}: expected a name without / and =")
        section = Section(where, content)
        label = section.take("label", str)
        sweep = dict(_values(where, section.names("sweep"), TrainConfig, EvaluateConfig))
        if len(sweep) > 1:
            raise InputError(f"{where}: sweep: expected one option, got {', '.join(sweep)}")
        row = _row(where, name, label, section, selection)
        if not sweep:
            yield name, row
        for option, values in sweep.items():
            is_trained = option in names_of(TrainConfig) and not row.model_of
            for value in values:
                more = {option: value}
                yield f"{name}={value}", Row(
                    name=f"{name}={value}", label=f"{label or name} {value}",
                    train=row.train | more if is_trained else row.train,
                    evaluate=row.evaluate if is_trained else row.evaluate | more,
                    plans=row.plans, grid=row.grid, model_of=row.model_of, planner=row.planner,
                    own_budget=row.own_budget, sweep=name, value=_number(f"{where}: sweep", value),
                )  # fmt: skip


def _row(where: str, name: str, label: str | None, section: Section, selection: str) -> Row:
    grid = dict(_values(where, section.names("grid"), TrainConfig, EvaluateConfig))
    model_of = section.take("model_of", str)
    own_budget = section.take("own_budget", str)
    plans = tuple(map(str, section.take("plans", list, [])))
    evaluate = section.take("evaluate", dict, Section(where, {})).options(EvaluateConfig)
    planner: dict[str, Any] | None
    if section._content.get("planner", ("", None))[1] is False:
        section.take("planner", bool)
        planner = None
    else:
        planner = section.take("planner", dict, Section(where, {})).options(PlannerConfig)
    if model_of and not plans:
        raise InputError(f"{where}: missing plans, the selections to evaluate the model of {model_of} with")
    if "selection" in grid and not plans:
        raise InputError(f"{where}: missing plans, the selections to evaluate each of the grid with")
    train = section.options(*(() if model_of else (TrainConfig,)))
    return Row(
        name=name,
        label=label or name,
        train=train,
        evaluate=evaluate,
        plans=plans or (train.get("selection", selection),),
        grid=grid,
        model_of=model_of,
        planner=planner,
        own_budget=own_budget,
    )


def _values(
    where: str, names: Iterator[tuple[str, Any]], *configs: type[CommandConfig]
) -> Iterator[tuple[str, list[Any]]]:
    """Options with lists of values."""
    for given, values in names:
        name = given.replace("-", "_")
        config = next((config for config in configs if name in names_of(config) - OURS), None)
        if config is None:
            known = sorted(set().union(*map(names_of, configs)) - OURS)
            close = difflib.get_close_matches(name, known, n=1)
            raise InputError(f"{where}: unknown {given!r}" + (f"; did you mean {close[0]}?" if close else ""))
        if not isinstance(values, list) or not values:
            raise InputError(f"{where}: {given}: expected a list of values, got {shown(values)}")
        options = [as_option(f"{where}: {given}", config, name, value) for value in values]
        if len(set(map(repr, options))) < len(options):
            raise InputError(f"{where}: {given}: expected each value once, got {shown(values)}")
        yield name, options


def _curve(where: str, name: str, content: Any) -> Curve:
    section = Section(where, content)
    plans = tuple(map(str, section.take("plans", list, [])))
    found = Curve(name, section.take("rows", str, name), plans, section.take("x", str, name))
    section.done()
    return found


def _pairs(where: str, pairs: list[Any]) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, str) for side in pair):
            raise InputError(f"{where}: compare: expected pairs such as [joint, hard/soft], got {shown(pair)}")
        yield pair[0], pair[1]


def _seeds(where: str, given: list[Any]) -> tuple[int, ...]:
    try:
        seeds = tuple(as_kind(int, seed) for seed in given)
    except ValueError as error:
        raise InputError(f"{where}: seeds: {error}") from None
    if not seeds or len(set(seeds)) < len(seeds) or not all(map(SEED.holds, seeds)):
        raise InputError(f"{where}: seeds: expected whole numbers from {SEED.words}, each once, got {shown(given)}")
    return seeds


def _training(**options: Any) -> TrainConfig:
    config = TrainConfig(**options)
    check_settings(config)
    return config


def _evaluation(**options: Any) -> EvaluateConfig:
    config = EvaluateConfig(**options)
    parse_plans(config)
    return config


def _build(config: Callable[..., Config], where: str, options: dict[str, Any]) -> Config:
    """A command's settings, whose errors say where the options are from."""
    try:
        return config(**options)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _check(path: Path, experiment: Experiment) -> None:
    """Refuse what contradicts itself, before anything is made."""
    if not experiment.backbones or not experiment.rows:
        raise InputError(f"{path}: expected at least one backbone, and one row")
    for backbone in experiment.backbones:
        _check_corpus(
            f"{path}: backbones: {backbone.name}: pretrain", experiment, "corpus", backbone.pretrain_corpus or None
        )
    for row in experiment.rows.values():
        _check_row(f"{path}: rows: {row.name}", experiment, row)
    _check_names(path, experiment)
    named = {"versus": [experiment.versus], "keep": experiment.keep, "compare": itertools.chain(*experiment.compare)}
    for what, names in named.items():
        for side in names:
            row_name, _, plan = side.partition("/")
            if row_name not in experiment.rows:
                close = difflib.get_close_matches(row_name, experiment.rows, n=1)
                advice = f"; did you mean {close[0]}?" if close else ""
                raise InputError(f"{path}: {what}: no row {row_name!r}{advice}")
            if plan and plan not in experiment.rows[row_name].plans:
                raise InputError(f"{path}: {what}: {side}: {plan} is not among the plans of that row")
            if "/" in side and what == "keep":
                raise InputError(f"{path}: keep: {side}: a row has one model for all plans; give {row_name}")
    for curve in experiment.curves:
        points = [row for row in experiment.rows.values() if row.sweep == curve.rows]
        if not points or set(curve.plans) - set(points[0].plans):
            raise InputError(
                f"{path}: curves: {curve.name}: expected the name of a row with sweep, and some of its plans"
            )
    count = sum(len(row.candidates()) for row in experiment.rows.values())
    if count * len(experiment.backbones) * len(experiment.seeds) > MOST_CELLS:
        raise InputError(f"{path}: more than {MOST_CELLS:,} cells")
    _check_budgets(path, experiment)


def _check_names(path: Path, experiment: Experiment) -> None:
    """Refuse names under which tables and plots would show one thing in the place of another."""
    names = {
        "rows are labelled": [
            figure_name(row.label, row.plans, plan) for row in experiment.rows.values() for plan in row.plans
        ],
        "plots are called": [
            plot_name(backbone.name, what)
            for backbone in experiment.backbones
            for what in (*PLOTS, *(curve.name for curve in experiment.curves))
        ],
    }
    for what, found in names.items():
        if twice := next((name for name in found if found.count(name) > 1), None):
            raise InputError(f"{path}: two {what} {twice}; give one another name")


def _check_row(where: str, experiment: Experiment, row: Row) -> None:
    if row.model_of:
        base = experiment.rows.get(row.model_of)
        if base is None or base.model_of:
            raise InputError(f"{where}: model_of: expected a row that trains a model, got {row.model_of!r}")
        if row.own_budget or row.planner:
            raise InputError(f"{where}: own_budget and planner belong to {row.model_of}, which trains the model")
    for backbone in experiment.backbones:
        for values in row.candidates():
            options = experiment.train_options(backbone, experiment.base(row), {} if row.model_of else values)
            trained = _build(_training, where, {**_located(where, experiment, options), "corpus": "-", "out": "-"})
            _check_plans(where, row, trained)
            options = experiment.evaluate_options(backbone, row, values)
            _build(_evaluation, where, {**_located(where, experiment, options), "corpus": "-", "run": "-"})
    if row.planner is not None:
        _build(PlannerConfig, where, {**experiment.planner, **row.planner, "corpus": "-", "out": "-"})


def _check_plans(where: str, row: Row, trained: TrainConfig) -> None:
    """Refuse plans that there are not, or that a model trained in this way has not."""
    unknown = set(row.plans) - SELECTIONS.keys() - {SAMPLED}
    if unknown or len(set(row.plans)) < len(row.plans):
        raise InputError(
            f"{where}: plans: expected some of {', '.join(SELECTIONS)}, each once, got {', '.join(row.plans)}"
        )
    has_planner, reads_lm = trained.conditioning != "bottleneck", trained.planner_input != PLANNER_INPUTS[0]
    problem = plans_problem(list(row.plans), "the row", has_planner=has_planner, top_k=trained.top_k, reads_lm=reads_lm)
    if problem:
        raise InputError(f"{where}: plans: {problem}")


def _located(where: str, experiment: Experiment, options: dict[str, Any]) -> dict[str, Any]:
    """Options, whose other corpora have to be those of the file."""
    for name in CORPUS_OPTIONS:
        _check_corpus(where, experiment, name, options.get(name))
    if options.get("mix"):
        raise InputError(f"{where}: mix: all rows of an experiment have its corpus alone; give such a run to train")
    return options


def _check_corpus(where: str, experiment: Experiment, option: str, name: str | None) -> None:
    if name is not None and name not in experiment.corpora:
        raise InputError(f"{where}: {option} {name}: no corpus of this name under corpora")


def _check_budgets(path: Path, experiment: Experiment) -> None:
    """Refuse rows that will be trained on unequal numbers of tokens and do not say why."""
    for backbone in experiment.backbones:
        budgets: dict[tuple[Any, ...], str] = {}
        for row in experiment.rows.values():
            for values in row.candidates():
                if row.model_of or row.own_budget:
                    continue
                options = experiment.train_options(backbone, row, values)
                config = TrainConfig(**options, corpus="-", out="-")
                if config.patience is not None:
                    raise InputError(
                        f"{path}: rows: {row.name}: patience may stop it early; own_budget: REASON allows it"
                    )
                budgets[tuple(getattr(config, name) for name in BUDGET)] = row.name
        if len(budgets) > 1:
            ways = "; ".join(
                f"{name} ({', '.join(f'{option} {value}' for option, value in zip(BUDGET, budget, strict=True))})"
                for budget, name in budgets.items()
            )
            raise InputError(
                f"{path}: rows of {backbone.name} have unequal budgets: {ways}; own_budget: REASON allows it"
            )


def _of(config: type[CommandConfig], values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names_of(config)}


def _number(where: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: expected numbers, got {shown(value)}") from None
