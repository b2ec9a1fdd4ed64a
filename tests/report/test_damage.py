"""A run's files may hold anything: one line that names the file, or a page, and never a traceback."""

import json
import math
import os

import pytest

import planlm.report.page as page
from planlm.config import ReportConfig
from planlm.errors import InputError
from planlm.report.plots import curves_figure, perplexity_figure, save_png, to_svg
from planlm.report.shapes import misfit

GENERATION = {"prompt": "p", "text": "t", "selection": "soft",
              "plan": [{"sentence": "s", "forced": None, "actions": [{"action": 1, "probability": 0.5}]}]}  # fmt: skip
WRONG = [None, True, "text", -1, 2.5, 10**400, math.nan, math.inf, -math.inf, [], [1], {}, {"a": 1}, [[]], "\ud800"]


def places(value, place=()):
    """Paths to every value inside a JSON value."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*place, key))


def replaced(value, place, new):
    """A copy with what is at `place` replaced by `new`, or deleted where that is `del`."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    if new == "del":
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return copy


@pytest.fixture
def report(tmp_path):
    """Write the report of some runs: the page, or the one line that says why not."""

    def make(*runs):
        out = tmp_path / "report.html"
        out.unlink(missing_ok=True)
        said = ""
        try:
            page.write_report(ReportConfig(runs=tuple(map(str, runs)), out=str(out)))
        except InputError as error:
            said = str(error)
        assert "\n" not in said and out.exists() == (not said)
        return said or out.read_text()

    return make


FILES = [
    "evaluation.json",
    "generation.json",
    "planner_metrics.json",
    "generation_evaluation.json",
    "corpus/actions.json",
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("new", [*WRONG, "del"], ids=repr)
def test_any_value_of_a_json_file_may_be_wrong(make_run, report, planner, generated, described, file, new, monkeypatch):
    # Plots take nearly all of the time, and are tried below.
    monkeypatch.setattr(page, "perplexity_figure", lambda result: None)
    monkeypatch.setattr(page, "curves_figure", lambda runs: None)
    monkeypatch.setattr(page, "to_svg", lambda figure, prefix: "")
    files = {"planner_metrics": planner | {"split": "validation"}, "generation_evaluation": generated}
    run = make_run("run", lines=2, generation=GENERATION, **files)
    (run / "corpus").mkdir()
    (run / "corpus" / "actions.json").write_text(json.dumps(described))
    (run / "config.yaml").write_text(f"corpus: {run / 'corpus'}\nselection: soft\n")
    whole = json.loads((run / file).read_text())
    if file == "evaluation.json":  # two documents are enough
        for values in (whole["test"]["scores"]["tokens"], *whole["test"]["scores"]["nll"].values()):
            del values[2:]
    tried = set()
    for place in places(whole):
        kind = tuple(part for part in place if isinstance(part, str))  # one item of a list stands for all
        if place and kind not in tried:
            tried.add(kind)
            (run / file).write_text(json.dumps(replaced(whole, place, new)))
            assert report(run).startswith(("<!doctype", f"{run / file}: ")), place


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("[1,2]", "expected an object, got a list"),
        ("7", "expected an object, got 7"),
        ('{"loss": 1}', "no 'step'"),
        ('{"step": "1"}', "step: expected a count, got '1'"),
        ('{"step": 1.5}', "step: expected a count, got 1.5"),
        ('{"step": true}', "step: expected a count, got True"),
        ('{"step": 1' + "0" * 400 + "}", "step: expected a count, got a number too large"),
        ('{"step": 1' + "0" * 5000 + "}", "not valid JSON"),
        ('{"step": 1, "lm_loss": "low"}', "lm_loss: expected a finite number, got 'low'"),
        ('{"step": 1, "loss": [1]}', "loss: expected a finite number, got a list"),
        ('{"step": 1, "seconds": 1e999}', "seconds: expected a finite number, got inf"),
        ('{"step": 1, "tokens_per_second": 1' + "0" * 400 + "}", "got a number too large"),
        ("[" * 100_000, "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_a_line_that_is_none_of_a_step_is_named_with_its_number(make_run, report, line, fault):
    run = make_run("run", lines=1)
    (run / "metrics.jsonl").write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    said = report(run)
    assert said.startswith(f"{run / 'metrics.jsonl'}:2: ") and fault in said and said.endswith("; delete the line")


def test_what_is_not_a_number_is_as_if_it_had_not_been_logged(make_run, report):
    run = make_run("run", lines=1)
    (run / "metrics.jsonl").write_text('{"step": 1, "lm_loss": NaN, "loss": Infinity, "seconds": null, "x": "y"}\n')
    assert report(run).startswith("<!doctype")
    (run / "metrics.jsonl").write_text("")
    assert "No training was logged" in report(run)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000, "a: &a [x, x]\nb: [*a, *a]\n", "a: {b: 1}", "a: [b]", "? [a]\n: 1", "\x00",
        "a: !!python/object:os.system x", "- a", "a: 1\na: 2", "a: " + "x" * (1 << 20),
    ],
)  # fmt: skip
def test_a_configuration_that_is_none_is_named(make_run, report, text):
    run = make_run("run", lines=1)
    (run / "config.yaml").write_text(text)
    assert report(run).startswith(f"{run / 'config.yaml'}:")


@pytest.mark.parametrize("text", ["2026-99-99", "1" + "0" * 5000, "0x" + "f" * 5000])
def test_what_yaml_makes_odd_things_of_is_shown_as_it_stands(make_run, report, text):
    run = make_run("run", lines=1)
    (run / "config.yaml").write_text(f"a: {text}")
    assert f"<td>{text}</td>" in report(run)


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "evaluation.json", "generation.json"])
def test_a_pipe_or_folder_is_named_and_not_waited_for(make_run, report, file):
    for make in (os.mkfifo, os.mkdir):
        run = make_run("run" + make.__name__, lines=1)
        (run / file).unlink(missing_ok=True)
        make(run / file)
        assert report(run).startswith(f"{run / file}: not a file")


def test_bytes_that_are_no_text_are_named(make_run, report):
    for file in ("config.yaml", "evaluation.json"):
        run = make_run(f"run-{file}", lines=1)
        (run / file).write_bytes(b"\xff\xfe")
        assert report(run).startswith(f"{run / file}: not ")


@pytest.mark.parametrize("name", ["$$", r"$\frac{", "_hidden", "a&b<c>", "x" * 120, "\x1b[31m", "a\nb", "漢字"])
def test_a_run_may_have_any_name(make_run, report, result, name, tmp_path):
    assert report(make_run(name), make_run("other")).startswith("<!doctype")
    for row in result["rows"]:
        row["plan"] = name if row["plan"] == "fixed" else row["plan"]
    figure = perplexity_figure(result | {"versus": name, "split": name})
    save_png(figure, tmp_path / "figure.png")
    assert to_svg(figure, "x").count("<svg") == 1
    curves_figure({name: [{"step": 1, "lm_loss": 1.0}]})


def test_a_diverged_model_has_a_page(make_run, report):
    run = make_run("run")
    content = json.loads((run / "evaluation.json").read_text())
    row = next(row for row in content["test"]["rows"] if row["verdict"] != "reference")
    row |= {"perplexity": 1e300, "delta": 690.0, "ci95": [600.0, 699.0]}
    (run / "evaluation.json").write_text(json.dumps(content))
    assert "1.00e+300" in report(run)


def test_shapes():
    shape = {"a": int, "b?": (None, [float]), "c": {"*": str}}
    assert misfit({"a": 1, "c": {"x": "y"}}, shape) is None
    assert misfit({"a": 0, "b": [1, 2.5], "c": {}, "more": 1}, shape) is None
    assert misfit({"c": {}}, shape) == "no 'a'"
    assert misfit({"a": 1, "b": [1, None], "c": {}}, shape) == "b[1]: expected a finite number, got None"
    assert misfit({"a": 1, "c": {"x": 3}}, shape) == "c.x: expected a text, got 3"


def test_a_page_may_fetch_and_run_nothing(make_run, report):
    html = report(make_run("run", generation=GENERATION | {"text": "<img src=//x onerror=alert(1)>"}))
    policy = html.split('http-equiv="Content-Security-Policy" content="')[1].split('"')[0]
    assert policy.split("; ")[0] == "default-src 'none'"
    assert "script" not in policy and "http" not in policy
    assert html.index("Content-Security-Policy") < html.index("<style")
