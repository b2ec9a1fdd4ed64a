"""The model card: what the hub and its readers are told, with nothing of this machine, and users' own text is kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from planlm import cli
from planlm.model import PlanLMForCausalLM
from planlm.model.card import BEGIN, END, hub_name
from planlm.model.loading import load_model, save_model

K, A = 40, 16
LABELS = ["a|b", "`code` *x*", "two\nlines", "--- # top", "<!-- planlm ends -->", "\x1b[31mred", "[a](b)", "C:\\new"]


@pytest.fixture
def model(lm_folder: Callable[[str], str]) -> PlanLMForCausalLM:
    labels = [*LABELS, *(f"label {action}" for action in range(len(LABELS), K - 2)), "", ""]
    return PlanLMForCausalLM.from_lm(lm_folder("gpt2"), torch.randn(K, A), action_labels=labels)


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def table(text: str, heading: str) -> dict[str, str]:
    """The rows of the first table behind a heading, with backslashes taken away as Markdown does."""
    lines = text.partition(heading)[2].partition("| --- | --- |\n")[2].splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in takewhile(lambda line: line.startswith("|"), lines)]
    assert all(len(row) == 2 for row in rows), rows
    return {name.strip(): re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", value).strip() for name, value in rows}


def test_the_hub_reads_it(model: PlanLMForCausalLM, tmp_path: Path) -> None:
    model.config.base_model = "openai-community/gpt2"
    model.save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["planlm"],
        "base_model": "openai-community/gpt2",
    }
    assert "\n# openai-community/gpt2 with a planner\n" in card(tmp_path)


def test_it_says_how_the_model_is_built(model: PlanLMForCausalLM, tmp_path: Path) -> None:
    model.config.plan_temperature, model.config.encoder = 0.5, "sentence-transformers/all-MiniLM-L6-v2"
    model.save_pretrained(tmp_path)
    rows = table(card(tmp_path), BEGIN)
    assert rows["temperature"] == "0.5" and rows["actions (K)"] == "40" and rows["selection"] == "soft"
    assert rows["conditioning"] == "adapter" and rows["conditioned layers"] == "the topmost 1 of 3"
    assert rows["sentence encoder"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert "## Training" not in card(tmp_path), "nothing is known of any"


def test_labels_are_text_and_nothing_else(model: PlanLMForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    text = card(tmp_path)
    rows = table(text, "## Actions")
    shown = ["a|b", "`code` *x*", "two lines", "--- # top", "<!-- planlm ends -->", "\\x1b[31mred", "[a](b)", "C:\\new"]
    assert [rows[str(action)] for action in range(len(shown))] == shown
    assert len(rows) == 32 and "\nand 8 more\n" in text
    assert (text.count(BEGIN), text.count(END), text.count("\n---\n")) == (1, 1, 1)
    assert text.isprintable() or not re.search(r"[^\n -~]", text)


def test_the_program_and_the_command_of_a_card_run(
    model: PlanLMForCausalLM,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    encoder: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("planlm.model.loading.SentenceEncoder", lambda name: encoder)
    model.config.encoder = "hash"
    model.save_pretrained(tmp_path / "model")
    [program], [command] = (
        re.findall(f"```{name}\n(.*?)```", card(tmp_path / "model"), re.DOTALL) for name in ("python", "sh")
    )
    exec(program.replace("FOLDER", str(tmp_path / "model")), {})
    assert capsys.readouterr().out.startswith("The harbour was built in 1905.")
    words = re.findall(r'"[^"]*"|\S+', command.replace("FOLDER", str(tmp_path / "model")))[1:]
    assert cli.main([word.strip('"') for word in words]) == 0


def test_nothing_of_this_machine_is_in_it(model: PlanLMForCausalLM, lm_folder: Any, tmp_path: Path) -> None:
    model.config.encoder = str(tmp_path / "encoder")
    model.config.trained = {"corpus (fingerprint)": "0" * 64, "steps": 1000, "loss (nats)": 3.25}
    model.save_pretrained(tmp_path)
    text = card(tmp_path)
    assert str(tmp_path) not in text and lm_folder("gpt2") not in text and "base_model" not in text
    assert model.config.base_model == ""
    assert table(text, "## Training") == {"corpus (fingerprint)": "0" * 64, "steps": "1,000", "loss (nats)": "3.25"}


@pytest.mark.parametrize("name", ["/a/b", "./encoder", "../encoder", "~/lm", "a/b/c", "C:\\lm", "", "a b", "-x\n- y"])
def test_paths_are_no_names_of_the_hub(name: str) -> None:
    assert hub_name(name) == ""


def test_what_users_write_is_kept(model: PlanLMForCausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model")
    path = tmp_path / "model" / "README.md"
    mine = (
        card(tmp_path / "model").replace("tags:", "license: mit\ntags:").replace("\n# ", "\n# Mine, not ")
        + "\r\nBye.\n"
    )
    path.write_bytes(mine.replace("| 0.5 |", "").encode())
    model.config.plan_temperature = 0.25
    for save in (lambda: save_model(model, tmp_path / "model"), lambda: model.save_pretrained(tmp_path / "model")):
        save()
        text = path.read_bytes().decode()
        assert text == mine.replace("| temperature | 1 |", "| temperature | 0.25 |")


@pytest.mark.parametrize("text", [b"# All of it mine\n", b"\xff\xfe", BEGIN.encode() + b"\nwithout an end"])
def test_a_card_without_the_marks_is_the_users(model: PlanLMForCausalLM, tmp_path: Path, text: bytes) -> None:
    (tmp_path / "README.md").write_bytes(text)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == text


def test_a_copy_has_a_card_of_its_own(model: PlanLMForCausalLM, tmp_path: Path) -> None:
    model.config.trained, model.config.base_model = {"steps": 7}, "gpt2"
    model.save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    assert card(tmp_path / "again") == card(tmp_path / "model")
    assert load_model(str(tmp_path / "again")).config.trained == {"steps": 7}


def test_a_control_without_a_plan_says_so(lm_folder: Callable[[str], str], tmp_path: Path) -> None:
    model = PlanLMForCausalLM.from_lm(
        lm_folder("gpt2"), torch.randn(K, A), conditioning="bottleneck", selection="fixed"
    )
    model.save_pretrained(tmp_path)
    assert "and no plan: a control" in card(tmp_path) and "planner" not in "".join(table(card(tmp_path), BEGIN))
