"""The HTML page: valid, self-contained, escaped, and sensible where something is missing."""

import json
import re
import shlex
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser

import pytest

from planlm import arguments
from planlm.config import ReportConfig, TrainConfig
from planlm.errors import InputError
from planlm.report.page import write_report
from planlm.report.results import compare_runs, load_runs

VOID = {"meta", "br", "hr", "img", "link", "input"}
ACTIONS = [{"action": 12, "probability": 0.31}, {"action": 7, "probability": 0.2}]
GENERATION = {
    "prompt": "The castle <b>was</b> built in 1204.",
    "text": " It burned & fell. Then",
    "selection": "soft",
    "plan": [
        {"sentence": "It burned & fell.", "actions": ACTIONS, "forced": None},
        {"sentence": "Then", "actions": ACTIONS, "forced": 99},
    ],
}


class Page(HTMLParser):
    """Checks nesting; collects text, ids and whatever a browser would fetch."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.ids, self.fetched, self.tags = [], "", [], [], set()
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "data", "action", "poster", "srcset") and not value.startswith("#"):
                self.fetched.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def seen(html):
    """The text of a page, with cells apart."""
    return " ".join(unescape(re.sub("<[^>]*>", " ", html)).split())


@pytest.fixture
def report(tmp_path):
    """Write the report of some runs and read it back."""

    def make(*runs):
        out = write_report(ReportConfig(runs=tuple(map(str, runs)), out=str(tmp_path / "report.html")))
        html = out.read_text()
        return html, Page(html)

    return make


def test_the_page_is_valid_and_asks_nothing_of_the_network(report, make_run):
    html, page = report(make_run("fixed", "fixed", 0.0), make_run("soft", generation=GENERATION))
    assert page.fetched == []
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert "prefers-color-scheme: dark" in html


def test_one_run_shows_all_it_has(report, make_run):
    _, page = report(make_run("soft", splits=("test", "validation"), generation=GENERATION))
    for expected in (
        "Perplexity on the test split", "Perplexity on the validation split", "LM loss",
        "accuracy@10", "0.6920", "It burned & fell.", "31%", "99 asked for", "6,600",
        "LM frozen; planner trained jointly",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "Comparison" not in page.text


@pytest.mark.parametrize(
    ("selection", "frozen", "said"),
    [("soft", False, "planner trained jointly"), ("soft", True, "planner frozen"), ("hard", False, "LM frozen.")],
)
def test_the_headline_says_what_trained(report, make_run, selection, frozen, said):
    _, page = report(make_run("run", selection, config={"freeze_planner": frozen}))
    assert said in page.text
    assert ("planner" in page.text.split("conditioned on")[1].split(".")[0]) == (selection == "soft")


def test_the_cost_of_planning_stands_below_its_gain(report, make_run):
    run = make_run("soft")
    stored = json.loads((run / "evaluation.json").read_text())
    stored["test"]["cost"] = {
        "parameters": {"lm": 6_300_000, "planner": 1_100_000}, "selection": "soft",
        "seconds_per_1000_tokens": {"none": 0.0301, "fixed": 0.0302, "soft": 0.0361},
    }  # fmt: skip
    (run / "evaluation.json").write_text(json.dumps(stored))
    _, page = report(run)
    words = " ".join(page.text.split())
    assert "lm 6,300,000, planner 1,100,000" in words and "none 0.030, soft 0.036" in words


def test_text_from_a_run_is_escaped(report, make_run):
    evil = "<script>alert('x')</script>"
    html, page = report(make_run("soft", generation=GENERATION, config={"lm": evil, evil: evil}))
    assert "<script" not in html
    assert evil in page.text
    assert "<b>" not in html
    assert "The castle <b>was</b> built" in page.text


def test_actions_are_described_and_mapped(report, make_run, described, tmp_path):
    (tmp_path / "corpus").mkdir()
    runs = [make_run(name, config={"corpus": str(tmp_path / "corpus")}) for name in ("one", "two")]
    _, page = report(*runs)
    assert page.text.count("What the actions mean") == 1 and f"planlm actions {tmp_path / 'corpus'}" in page.text
    (tmp_path / "corpus" / "actions.json").write_text(json.dumps(described))
    html, page = report(*runs)
    words = seen(html)
    assert "1 ships <i> ship, sea" in words and "A <b>ship</b> sank." in words and "0 30%" in words
    assert "<b>" not in html and "<i>" not in html and page.text.count("1 ships <i>") == 3  # map, table, what follows
    _, page = report(make_run("three", config={"corpus": str(tmp_path / "elsewhere")}))
    assert "What the actions mean" not in page.text


def test_many_actions_are_behind_a_click(report, make_run, described, tmp_path):
    one = described["actions"][0]
    many = [one | {"action": number, "position": [number / 30, 0.0], "label": "x"} for number in range(30)]
    (tmp_path / "actions.json").write_text(json.dumps({"actions": many}))
    html, page = report(make_run("run", config={"corpus": str(tmp_path)}))
    assert "6 more actions" in page.text and html.count("<details>") == 2  # the other is the configuration's
    drawn = html[html.index("<svg", html.index("What the actions")) :]
    assert 1 < drawn[: drawn.index("</svg>")].count("<text") < 30  # only those names that there is room for


def test_metrics_of_generated_texts(report, make_run, generated):
    html, _ = report(make_run("run", generation_evaluation=generated))
    words = seen(html)
    assert "Generated continuations, test split" in words and "Continuations of 100 documents" in words
    assert "MAUVE 0.2500 – 0.2500" in words and "soft against fixed" in words and "−0.1250 [−0.2000, −0.1000]" in words
    assert "difference +0.375 [+0.250, +0.500] +0.4 [+0.2, +0.5] –" in words and "steered 0.375 [0.250, 0.500]" in words
    generated["test"].pop("steering")
    assert "Steering" not in report(make_run("older", generation_evaluation=generated))[0]


def test_what_was_forgotten(report, make_run):
    run = make_run("run")
    stored = json.loads((run / "evaluation.json").read_text())
    lost = {"before": 5.0, "after": 5.25, "delta": 0.25, "ci95": [0.125, 0.375], "documents": 60}
    stored["test"]["forgetting"] = {"corpus": "wikitext", "split": "validation", **lost, "trained_on": lost}
    (run / "evaluation.json").write_text(json.dumps(stored))
    html, _ = report(run)
    words = seen(html)
    assert "Forgetting" in words and "wikitext, validation 148.41 190.57 +0.2500 [+0.1250, +0.3750] 60" in words


def test_a_document_is_shown_beside_what_the_planner_expected(report, make_run, described, tmp_path):
    (tmp_path / "actions.json").write_text(json.dumps(described))
    run = make_run("run", config={"corpus": str(tmp_path)})
    stored = json.loads((run / "evaluation.json").read_text())
    expected = [{"action": 1, "probability": 0.75}, {"action": 0, "probability": 0.25}]
    sentences = [{"sentence": "It <u>sank</u>.", "action": 1, "expected": expected}]
    stored["test"]["example"] = {"id": "document 7", "sentences": sentences}
    stored["test"]["planner"]["calibration"] = [{"confidence": 0.5, "accuracy": 0.25, "sentences": 8}]
    (run / "evaluation.json").write_text(json.dumps(stored))
    html, _ = report(run)
    assert "document 7" in seen(html) and "<u>" not in html and "Calibration of the planner" in html
    row = html[html.index("It &lt;u&gt;") :]
    assert seen(row[: row.index("</tr>")]) == "It <u>sank</u>. 1 ships <i> 1 ships <i> 75% 0 25%"
    assert "<strong>1 ships &lt;i&gt;</strong>" in row[: row.index("</tr>")]


def test_commands_repeat_what_was_made(report, make_run, planner, tmp_path):
    corpus = tmp_path / "my corpus"
    corpus.mkdir()
    manifest = {"sources": [{"input": "a b.jsonl"}], "settings": {"actions": 8, "min_sentences": 2, "seed": 3}}
    (corpus / "corpus.json").write_text(json.dumps(manifest | {"encoder": "E", "tokenizer": "T"}))
    first = make_run("planner", evaluated=(), planner_metrics=planner | {"split": "validation"})
    (first / "config.yaml").write_text(f"corpus: {corpus}\nout: {first}\nlayers: 1\nepochs: 4.0\nresume: true\n")
    settings = {"corpus": str(corpus), "planner": str(first), "out": "run", "lr": 0.01, "compile": True}
    settings["mix"] = ["more=0.3", "b c=0.1"]
    _, page = report(make_run("run", config=settings))
    prepare = f"planlm prepare 'a b.jsonl' --out '{corpus}' --actions 8 --encoder E --tokenizer T --seed 3"
    assert prepare in page.text
    assert f"planlm pretrain-planner --corpus '{corpus}' --out {first} --layers 1\n" in page.text
    train = re.search(r"planlm train .*", page.text)[0]
    words = shlex.split(train)[2:]
    read = arguments.parse(TrainConfig, words, prog="planlm train", epilog="")
    assert (read.corpus, read.planner, read.lr, read.compile) == (str(corpus), str(first), 0.01, True)
    assert read.mix == ("more=0.3", "b c=0.1")
    assert "--batch-size" not in words


def test_several_runs_are_compared_under_the_plans_they_were_trained_with(report, make_run):
    names = {"two-stage": ("hard", -0.004), "fixed": ("fixed", 0.0), "joint-soft": ("soft", -0.02)}
    runs = [make_run(name, *plan) for name, plan in names.items()]
    _, page = report(*runs)
    assert page.text.index("Comparison") < page.text.index("Training")
    result = compare_runs(load_runs([str(run) for run in runs]), "test")
    assert result["versus"] == "fixed"
    assert [row["plan"] for row in result["rows"]] == ["no plan", "two-stage (hard)", "fixed", "joint-soft"]
    assert result["rows"][3]["delta"] == pytest.approx(-0.02, abs=0.005)
    assert result["rows"][3]["verdict"] == "better"
    assert result["left_out"] == []
    assert compare_runs(load_runs([str(run) for run in runs]), "validation") is None


def test_runs_are_compared_by_sentence_too_where_their_files_say_it(report, make_run):
    runs = [make_run("fixed", "fixed", 0.0), make_run("soft")]
    loaded = compare_runs(load_runs(list(map(str, runs))), "test")
    assert len(loaded["by_length"]) == 4 and "by_position" not in loaded, "files of earlier versions"
    for run in runs:
        stored = json.loads((run / "evaluation.json").read_text())
        scores = stored["test"]["scores"]
        scores["position_tokens"] = [[1, *[0] * 5, count - 1] for count in scores["tokens"]]
        scores["position_nll"] = {
            plan: [[0.0] * 6 + [total] for total in nll] for plan, nll in scores["nll"].items()
        }  # what separates the runs lies behind the 32nd sentence
        (run / "evaluation.json").write_text(json.dumps(stored))
    first, last = compare_runs(load_runs(list(map(str, runs))), "test")["by_position"]
    assert (first["bucket"], last["bucket"]) == ("1", "33+")
    assert first["rows"][-1]["delta"] == 0 and last["rows"][-1]["delta"] == pytest.approx(-0.01, abs=0.005)
    _, page = report(*runs)
    assert "number of the sentence" in page.text
    for row in ([1.0], [1.0] * 7, [1e300, -1e300, *[0.0] * 5]):
        stored["test"]["scores"]["position_nll"]["soft"][3] = row
        (runs[1] / "evaluation.json").write_text(json.dumps(stored))
        with pytest.raises(InputError, match="by position do not add up to those of documents under 'soft'"):
            report(*runs)


def test_runs_that_scored_other_tokens_are_left_out_and_named(report, make_run):
    runs = [make_run("fixed", "fixed", 0.0), make_run("soft"), make_run("other", "hard", -0.01)]
    results = json.loads((runs[2] / "evaluation.json").read_text())
    results["test"]["window"] = 128
    (runs[2] / "evaluation.json").write_text(json.dumps(results))
    _, page = report(*runs)
    assert "under their own plan: other." in " ".join(page.text.split())


def test_what_is_missing_is_named_with_the_command_that_makes_it(report, make_run, tmp_path):
    run = make_run("soft", evaluated=(), lines=0)
    (run / "metrics.jsonl").unlink()
    _, page = report(run)
    assert f"planlm evaluate {run} --corpus 'my corpus'" in page.text
    assert f"planlm generate {run} --prompt" in page.text
    assert "planlm train --corpus CORPUS --out RUN" in page.text
    (run / "config.yaml").write_text("{}")
    _, page = report(run, make_run("second"))
    assert "No config.yaml" in page.text
    assert "Nothing to compare yet" in page.text


def test_a_text_generated_without_plan_is_shown_as_it_is(report, make_run):
    _, page = report(make_run("soft", generation=GENERATION | {"plan": [], "selection": "none"}))
    assert "Continuation under none plans" in page.text
    assert GENERATION["text"] in page.text


def test_a_planner_run_shows_the_planner_and_asks_for_no_evaluation(report, make_run, planner):
    run = make_run("planner", evaluated=(), planner_metrics=planner | {"split": "validation"})
    (run / "config.yaml").write_text("corpus: c\nlayers: 2\n")
    _, page = report(run)
    assert "Planner, validation split" in page.text
    assert "Not evaluated yet" not in page.text


def test_a_half_written_last_line_is_left_out(report, make_run):
    run = make_run("soft", lines=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    assert [line["step"] for line in load_runs([str(run)])[0].metrics] == [10, 20, 30]
    report(run)


def test_runs_of_the_same_name_are_told_apart(make_run):
    runs = load_runs([str(make_run("a/soft")), str(make_run("b/soft"))])
    assert runs[0].name != runs[1].name


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("evaluation.json", "{", "not valid JSON"),
        ("evaluation.json", "[1]", "expected a JSON object, got list"),
        ("config.yaml", "a: [", "not YAML"),
        ("config.yaml", "just text", "expected lines of the form `setting: value`"),
        ("metrics.jsonl", '{"step": 1}\n{\n{"step": 3}\n', "metrics.jsonl:2: not valid JSON"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(make_run, tmp_path, file, content, message):
    run = make_run("soft")
    (run / file).write_text(content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        write_report(ReportConfig(runs=(str(run),), out=str(tmp_path / "report.html")))
    assert str(run / file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_wrong_paths_are_refused(make_run, tmp_path):
    (tmp_path / "empty").mkdir()
    for runs, out, message in (
        ((), "report.html", "runs: expected a text, or a list of at least one"),
        (("no/such/run",), "report.html", "no such run directory"),
        ((str(tmp_path / "empty"),), "report.html", "holds no results"),
        ((str(make_run("soft")),), "", "is a folder"),
    ):
        with pytest.raises(InputError, match=message):
            write_report(ReportConfig(runs=runs, out=str(tmp_path / out)))


def test_the_report_needs_neither_torch_nor_the_model():
    code = "import sys, planlm.report.page; print(sys.modules.keys() & {'torch', 'transformers', 'datasets'})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
