"""Settings from Python are what the fields say, or refused; and no number is beyond what a machine can do."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planlm import arguments, cli, config
from planlm.errors import InputError
from planlm.flat_yaml import read_flat
from planlm.settings import kind_of

ROOT = Path(__file__).parents[1]


def train(**changes: Any) -> config.TrainConfig:
    return config.TrainConfig(**{"corpus": "c", "out": "r", **changes})


# From Python


@pytest.mark.parametrize("inputs", ["x.parquet", Path("x.parquet"), ["x.parquet"], ("x.parquet",), [Path("x.parquet")]])
def test_one_input_is_a_list_of_one(inputs: Any) -> None:
    assert config.PrepareConfig(inputs=inputs, out="c").inputs == ("x.parquet",)


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("out", Path("a/b"), "a/b"),
        ("lm", Path("lm"), "lm"),
        ("steps", np.int64(7), 7),
        ("steps", torch.tensor(7), 7),
        ("steps", "7", 7),
        ("lr", np.float32(0.5), 0.5),
        ("lr", np.float64(0.5), 0.5),
        ("lr", 1, 1.0),
        ("lr", "1e-3", 1e-3),
        ("temperature", np.float16(2.0), 2.0),
        ("temperature", np.array(2.0), 2.0),
        ("gate", np.True_, True),
        ("oracle_mix", 0.5, "0.5"),
        ("steps", None, None),
    ],
)
def test_values_become_the_fields_types(name: str, given: Any, kept: Any) -> None:
    value = getattr(train(**{name: given}), name)
    assert value == kept and type(value) is type(kept)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("steps", 2.0, "a whole number, got 2.0"),
        ("steps", True, "a whole number, got True"),
        ("steps", np.True_, "a whole number"),
        ("steps", np.float32(2), "a whole number"),
        ("steps", "many", "a whole number, got 'many'"),
        ("steps", [3], "a whole number, got [3]"),
        ("steps", np.array([3]), "a whole number"),
        ("batch_size", None, "a whole number, got None"),
        ("lr", False, "a number, got False"),
        ("lr", "fast", "a number, got 'fast'"),
        ("lr", 10**400, "a number, got 1000"),
        ("lr", 1j, "a number, got 1j"),
        ("gate", 1, "true or false, got 1"),
        ("gate", "yes", "true or false, got 'yes'"),
        ("out", None, "a text, got None"),
        ("out", b"r", "a text, got b'r'"),
        ("out", ["r"], "a text, got ['r']"),
        ("out", "a\0b", "a text, got 'a\\x00b'"),
        ("out", "\ud800", "a text, got '\\ud800'"),
        ("selection", True, "a text, got True"),
        ("steps", "9" * 9000, "a whole number"),
    ],
)
def test_what_would_change_its_meaning_is_refused(name: str, given: Any, expected: str) -> None:
    with pytest.raises(InputError) as refused:
        train(**{name: given})
    assert str(refused.value).startswith(f"--{name.replace('_', '-')}: expected {expected}")
    assert len(str(refused.value)) < 200 and str(refused.value).isprintable()


@pytest.mark.parametrize("inputs", [(), [], [3], None, {"a"}, [b"x"], "a\0"])
def test_inputs_that_are_none_are_refused(inputs: Any) -> None:
    with pytest.raises(InputError, match=r"^inputs: expected a text, or a list of at least one, got "):
        config.PrepareConfig(inputs=inputs, out="c")


# Numbers


@pytest.mark.parametrize("value", [0, 1e-45, 1e39, 1e300])
def test_temperatures_by_which_scores_overflow_are_refused(value: float) -> None:
    """They gave NaN, of which it was said that training had diverged."""
    with pytest.raises(InputError, match=r"^--temperature .*: expected 1e-30 to 1e\+30$"):
        train(temperature=value)
    with pytest.raises(InputError, match=r"^--temperature .*: expected 1e-30 to 1e\+30$"):
        config.EvaluateConfig(run="r", corpus="c", temperature=value)
    with pytest.raises(InputError, match=r"^--soft-targets .*: expected 1e-30 to 1e\+30$"):
        config.PlannerConfig(corpus="c", out="r", soft_targets=value)


def whole_numbers() -> list[tuple[str, str]]:
    return [
        (command, field.name)
        for command, about in cli.COMMANDS.items()
        for field in dataclasses.fields(about.config)
        if kind_of(about.config, field.name) is int
    ]


@pytest.mark.parametrize(("command", "name"), whole_numbers())
def test_no_whole_number_is_without_bound(command: str, name: str, tmp_path: Path) -> None:
    """By flag, from a file and from Python; what is let through fits 32 bits."""
    about = cli.COMMANDS[command].config
    field = next(field for field in dataclasses.fields(about) if field.name == name)
    flag = "--" + name.replace("_", "-")
    needed: dict[str, Any] = {
        each.name: "x" for each in dataclasses.fields(about) if each.default is dataclasses.MISSING
    }
    words = [word for each in dataclasses.fields(about) if each.name in needed for word in (
        ["x"] if each.metadata["positional"] else ["--" + each.name.replace("_", "-"), "x"]
    )]  # fmt: skip
    (tmp_path / "file.yaml").write_text(f"{name}: {2**64}\n")
    for value in (2**31, 2**63, 2**64, 10**30, -(2**64)):
        for given in ([flag, str(value)], ["--config", str(tmp_path / "file.yaml")]):
            with pytest.raises(InputError, match=rf"{flag} \S+: expected (at |0 to)"):
                arguments.parse(about, [*words, *given], prog="planlm", epilog="")
        with pytest.raises(InputError, match=rf"{flag} \S+: expected (at |0 to)"):
            about(**{**needed, name: value})
    with pytest.raises(InputError):
        about(**{**needed, name: 10**5000})
    assert field.metadata["limit"] is not None


def test_epochs_without_end_are_refused() -> None:
    for value in (1e308, 10**30):
        with pytest.raises(InputError, match=r"--epochs .*: expected at most 1,000,000"):
            train(epochs=value)


# Files


def read(tmp_path: Path, text: str | bytes) -> dict[str, Any]:
    (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_flat(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("0.5", 0.5), ("true", True), ("null", None), ("'3'", "3"), ("[a, b]", ["a", "b"]),
        ("1e-3", "1e-3"), ("010", "010"), ("1:30", "1:30"), ("1_000", "1_000"), ("0x10", "0x10"), (".inf", ".inf"),
        ("2024-01-02", "2024-01-02"), ("2024-13-45", "2024-13-45"), ("9" * 9000, "9" * 9000), ("1.10", "1.10"),
        ("0x" + "f" * 5000, "0x" + "f" * 5000),
    ],
)  # fmt: skip
def test_plain_values_are_what_they_look_like(tmp_path: Path, text: str, value: Any) -> None:
    assert read(tmp_path, f"a: {text}\n") == {"a": value}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr: 1\nsteps: 2\nlr: 3\n", ":3: lr is set in line 1 already"),
        ("batch-size: 1\nbatch_size: 3\n", ":2: batch_size is set in line 1 already"),
        ("1: 2\n", ":1: expected a setting's name, which is a text"),
        ("true: 2\n", ":1: expected a setting's name"),
        ("? [a]\n: 2\n", ":1: expected a setting's name"),
        ("lr: {a: 1}\n", ":1: lr: expected a plain value or a list"),
        ("lr: [[1]]\n", ":1: lr: expected a plain value or a list"),
        ("lr: !!binary aGVsbG8=\n", ":1: lr: expected a plain value or a list"),
        ("lr: !!python/object/apply:os.system [id]\n", ":1: lr: expected a plain value or a list"),
        ("lr: !!int many\n", "lr: "),
        ("a: &a [x]\nb: &b [*a, *a]\n", ":2: b: expected a plain value or a list"),
        ("lr: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("lr: *nowhere\n", "not YAML"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
        (b"lr: \0\n", "not YAML"),
        ("# " + "x" * (1 << 20), "too large"),
    ],
)  # fmt: skip
def test_files_that_are_no_plain_lines_are_refused(tmp_path: Path, text: str | bytes, says: str) -> None:
    if "!!int many" in str(text):
        assert read(tmp_path, text) == {"lr": "many"}
        return
    with pytest.raises(InputError) as refused:
        read(tmp_path, text)
    assert says in str(refused.value) and "run.yaml" in str(refused.value) and "\n" not in str(refused.value)


# Advice


def test_advice_names_options_that_there_are() -> None:
    """A text names options of the commands that run its file, and of the command that it says to run first."""
    flags = {
        name: {"--" + field.name.replace("_", "-") for field in dataclasses.fields(command.config)}
        for name, command in cli.COMMANDS.items()
    }
    before = {"--tokenizer", "--encoder"} & flags["prepare"]
    both = flags["train"] & flags["pretrain-planner"]
    own = {
        "training/train.py": flags["train"] | before, "training/schedules.py": flags["train"],
        "training/pretrain_planner.py": flags["pretrain-planner"] | before, "training/loop.py": both,
        "training/run_directory.py": both, "training/checkpoint.py": both, "training/identity.py": both,
        "corpus/prepare.py": flags["prepare"],
        "corpus/codebook.py": flags["prepare"], "corpus/sources.py": flags["prepare"],
        "corpus/shards.py": flags["prepare"], "evaluation/evaluate.py": flags["evaluate"] | before | {"--top-k"},
        "experiments/paths.py": {"--out", "--seeds"},  # a command of its own
    }  # fmt: skip
    every = set().union(*flags.values()) | {"--version", "--help", "--config", "--nproc-per-node", "--no-deps"}
    named = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
    for path in (ROOT / "planlm").rglob("*.py"):
        name = path.relative_to(ROOT / "planlm").as_posix()
        if name == "report/plots.py":  # style sheets
            continue
        tree = ast.parse(path.read_text())
        docs = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in docs)
        unknown = {word for text in texts for word in named.findall(str(text.value))} - own.get(name, every)
        assert not unknown, f"{name} names {unknown}"
