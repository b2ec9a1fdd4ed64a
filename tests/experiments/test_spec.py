"""Files of experiments: what is wrong is named in one line, and those that are shipped fit the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planlm.config import EvaluateConfig, PlannerConfig, PrepareConfig, TrainConfig
from planlm.errors import InputError
from planlm.experiments.spec import Experiment, read_experiment

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_fit_the_commands(path: Path) -> None:
    found = read_experiment(path)
    assert found.name == path.stem and found.prepare is not None and found.compare
    PrepareConfig(**found.prepare, out="-")
    for backbone in found.backbones:
        for row in found.rows.values():
            PlannerConfig(**found.planner | (row.planner or {}), corpus="-", out="-")
            for values in row.candidates():
                if not row.model_of:
                    TrainConfig(**found.train_options(backbone, row, values), corpus="-", out="-")
                EvaluateConfig(**found.evaluate_options(backbone, row, values), corpus="-", run="-")


def test_shipped_files_are_on_the_page() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text()
    assert len(SHIPPED) >= 3 and all(f"experiments/{path.name}" in page for path in SHIPPED)


def test_options_of_rows_go_before_the_lms_and_those_before_the_common(read: Callable[..., Experiment]) -> None:
    found = read(
        backbones="backbones: {a: {lm: x, train: {lr: 0.5, warmup: 0.25}}}",
        **{
            "  lm": "",
            "  joint": "  joint: {selection: soft, lr: 1e-4, grid: {temperature: [1, 2], gumbel-scale: [3]}}",
        },
    )
    (backbone,), row = found.backbones, found.rows["joint"]
    options = found.train_options(backbone, row, row.candidates()[1])
    expected = {"lr": 1e-4, "warmup": 0.25, "steps": 2, "temperature": 2.0, "gumbel_scale": 3.0}
    assert expected.items() <= options.items()
    assert "temperature" not in found.evaluate_options(backbone, row, row.candidates()[1])


def test_rows_are_compared_on_test_unless_the_file_says_validation(read: Callable[..., Experiment]) -> None:
    assert read().split == "test" and read(seeds="split: validation").split == "validation"
    with pytest.raises(InputError, match="split: expected test or validation, got train"):
        read(seeds="split: train")
    with pytest.raises(InputError, match="row joint has a grid, of which validation chooses"):
        read(seeds="split: validation", **{"  joint": "  joint: {selection: soft, grid: {temperature: [1, 2]}}"})


def test_a_sweep_is_a_row_for_each_value(read: Callable[..., Experiment]) -> None:
    found = read(**{"  joint": "  joint: {selection: soft, sweep: {oracle_mix: [0, 0.5]}}", "compare": ""})
    assert [(row.name, row.value) for row in found.rows.values()] == [
        ("fixed", None), ("joint=0", 0.0), ("joint=0.5", 0.5),
    ]  # fmt: skip
    assert found.rows["joint=0.5"].train == {"selection": "soft", "oracle_mix": "0.5"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"versus": "verzus: fixed"}, "unknown 'verzus'; did you mean versus?"),
        ({"versus": "versus: fixt"}, "versus: no row 'fixt'; did you mean fixed?"),
        ({"compare": "compare: [[joint, hard]]"}, "compare: no row 'hard'"),
        ({"compare": "compare: [[joint/oracle, fixed]]"}, "joint/oracle: oracle is not among the plans of that row"),
        ({"compare": "compare: [joint, fixed]"}, "expected pairs such as"),
        ({"seeds": "seeds: [0, 0]"}, "seeds: expected whole numbers"),
        ({"seeds": "seeds: [a]"}, "seeds: expected a whole number, got 'a'"),
        ({"versus": "corpora: []"}, "corpora: expected names with values below it, got []"),
        ({"train": "train: {step: 3}"}, "train: unknown 'step'; did you mean steps?"),
        ({"train": "train: {steps: many}"}, "train: steps: expected a whole number, got 'many'"),
        ({"train": "train: {steps: 0}"}, "rows: fixed: --steps 0: expected at least 1"),
        ({"train": "train: {seed: 3}"}, "train: seed: is set by the experiment itself; delete it"),
        ({"train": "train: {corpus: c}"}, "train: corpus: is set by the experiment itself"),
        ({"train": "train: {mix: more=0.3}"}, "mix: all rows of an experiment have its corpus alone"),
        ({"train": "train: {steps: 1, steps: 2}"}, ":7: steps is set in line 7 already"),
        ({"train": "train: {" + "a: {" * 12 + "}" * 13}, "nested too deeply"),
        ({"planner": "planner: {horizont: 3}"}, "planner: unknown 'horizont'"),
        ({"  lm": "  lm: {}"}, "backbones: lm: expected either lm, a name or folder, or pretrain"),
        ({"  lm": "  lm: {pretrain: {layer: 3}}"}, "pretrain: unknown 'layer'; did you mean layers?"),
        ({"  lm": "  lm: {pretrain: {steps: -1}}"}, "pretrain: --steps -1: expected at least 1"),
        ({"  lm": "  lm: {pretrain: {corpus: more}}"}, "backbones: lm: pretrain: corpus more: no corpus of this name"),
        ({"  joint": "  joint: {selction: soft}"}, "rows: joint: unknown 'selction'; did you mean selection?"),
        ({"  joint": "  joint: {selection: sofd}"}, "rows: joint: --selection sofd: expected one of"),
        ({"  joint": "  joint: {selection: top-k}"}, "rows: joint: --selection top-k needs --top-k"),
        ({"  joint": "  joint: {selection: oracle, oracle_mix: 1}"}, "rows: joint: --oracle-mix has no meaning"),
        ({"  joint": "  joint: {plans: [sofd]}"}, "rows: joint: plans: expected some of soft, hard"),
        ({"  joint": "  joint: {grid: {temperatur: [1]}}"}, "unknown 'temperatur'; did you mean temperature?"),
        ({"  joint": "  joint: {grid: {temperature: 1}}"}, "temperature: expected a list of values, got 1"),
        ({"  joint": "  joint: {grid: {temperature: [0]}}"}, "--temperature 0.0: expected 1e-30 to 1e+30"),
        ({"  joint": "  joint: {sweep: {lr: [1], steps: [2]}}"}, "sweep: expected one option, got lr, steps"),
        ({"  joint": "  joint: {sweep: {selection: [soft]}}"}, "sweep: expected numbers, got 'soft'"),
        ({"  joint": "  joint: {model_of: fixt, plans: [none]}"}, "model_of: expected a row that trains a model"),
        ({"  joint": "  joint: {model_of: fixed}"}, "missing plans"),
        ({"  joint": "  joint: {model_of: fixed, lr: 1, plans: [none]}"}, "rows: joint: unknown 'lr'"),
        ({"  joint": "  joint: {steps: 3}"}, "rows of lm have unequal budgets: fixed (steps 2"),
        ({"  joint": "  joint: {grid: {window: [16, 8]}}"}, "unequal budgets"),
        ({"  joint": "  joint: 3"}, "rows: joint: expected names with values below it, got 3"),
        ({"  joint": "  a/b: {selection: soft}"}, "expected a name without / and ="),
        ({"  joint": "  joint: {label: fixed}"}, "two rows are labelled fixed; give one another name"),
        ({"  joint": "  joint: {grid: {temperature: [1, 1.0]}}"}, "temperature: expected each value once"),
        ({"  joint": "  joint: {grid: {selection: [soft, hard]}}"}, "missing plans, the selections to evaluate each"),
        ({"  joint": "  joint: {plans: [soft, top-k]}"}, "the row was not trained with --top-k; leave top-k out"),
        ({"  joint": "  joint: {selection: fixed, conditioning: bottleneck, plans: [soft]}"}, "has no plan"),
        ({"  joint": "  joint: {planner_input: lm, plans: [soft, shuffled]}"}, "reads the LM's states"),
        ({"  joint": "  joint: {evaluate: {num_plans: 4}}"}, "rows: joint: --num-plans 4: is for the row sampled"),
        ({"  lm": "  lm: {lm: x, train: {selection: hard}}"}, "selection: belongs to rows"),
        ({"  lm": "  lm: {lm: x}\n  a b: {lm: x}\n  a-b: {lm: x}"}, "two plots are called a-b-rows.png"),
        ({"compare": "keep: [joint/soft]"}, "keep: joint/soft: a row has one model for all plans; give joint"),
        (
            {"  joint": "  joint: {sweep: {lr: [1, 2]}}", "compare": "curves: {rows: {rows: joint}}"},
            "two plots are called lm-rows.png",
        ),
        ({"name": "name: ../x"}, "expected what can be a folder's name"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(read: Callable[..., Experiment], changes: Any, says: str) -> None:
    with pytest.raises(InputError) as refused:
        read(**changes)
    assert says in str(refused.value) and "tiny.yaml" in str(refused.value) and "\n" not in str(refused.value)


def test_a_budget_of_its_own_wants_a_reason(read: Callable[..., Experiment]) -> None:
    found = read(**{"  joint": "  joint: {steps: 3, own_budget: half the tokens say as much}"})
    assert found.rows["joint"].own_budget == "half the tokens say as much"


def test_rows_are_evaluated_with_the_selection_that_all_are_trained_with(read: Callable[..., Experiment]) -> None:
    shared = {"train": "train: {selection: hard}", "  joint": "  joint: {}", "versus": "", "compare": ""}
    found = read(**shared)
    assert found.rows["joint"].plans == ("hard",) and found.rows["fixed"].plans == ("fixed",)


def test_anchors_cannot_make_a_file_grow_without_end(read: Callable[..., Experiment]) -> None:
    lines = ["a0: &a0 [1, 1]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 60)}]" for n in range(1, 7)]
    with pytest.raises(InputError, match="nested too deeply, or too many values"):
        read("\n".join(lines))
