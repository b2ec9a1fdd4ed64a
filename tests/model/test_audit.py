"""The audit trail of `generate`: whole lines that say all of a sentence, whoever else writes to the file."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import planlm.model.generation as generation
from planlm.config import GenerateConfig
from planlm.files import append_lines
from planlm.model import PlanLMForCausalLM
from planlm.model.loading import model_checksum
from tests.model.conftest import A, K

PROMPT = "The cat sat on the mat. It was warm there. Rain"


@pytest.fixture
def run(gpt2: PlanLMForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory, and the model for it that needs no encoder's weights."""
    gpt2.config.action_labels = [f"label {action}" for action in range(K)]
    gpt2.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "identity.json").write_text('{"corpus": "c0ffee"}')
    monkeypatch.setattr(generation, "load_model", lambda run: gpt2)
    return tmp_path / "run"


def audited(run: Path, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result of a call and the lines that it leaves."""
    path = run.parent / "audit.jsonl"
    before = len(path.read_text().splitlines()) if path.exists() else 0
    settings = {"run": str(run), "prompt": PROMPT, "max_new_tokens": 60, "seed": 5, "audit": str(path), **options}
    result = generation.generate(GenerateConfig(**settings))
    return result, [json.loads(line) for line in path.read_text().splitlines()[before:]]


def test_a_line_says_all_of_its_sentence(run: Path) -> None:
    result, lines = audited(run, plan="3,*", ban="2", favour="label 4:1.5", temperature=0.7)
    assert len(lines) == len(result["plan"]) > 1
    for number, (line, sentence) in enumerate(zip(lines, result["plan"], strict=True)):
        shared = ("sentence", "action", "label", "forced", "drawn", "carried")
        assert {name: line[name] for name in shared}.items() <= sentence.items()
        assert line["number"] == number and line["text"] == lines[0]["text"] and ("prompt" in line) == (number == 0)
        assert line["prompt_sha256"] == hashlib.sha256(PROMPT.encode()).hexdigest()
        assert line["selection"] == "soft" and line["ban"] == [2] and line["favour"] == {"4": 1.5} and line["seed"] == 5
        assert line["sampling"] == {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 60, "attempts": 1}
        assert line["model"] == model_checksum(str(run)) and line["corpus"] == "c0ffee"
        assert line["row"] == line["sample"] == 0
        assert len(line["plan"]) == K and line["plan"][2] == 0 and sum(line["plan"]) == pytest.approx(1, abs=1e-5)
        likely = sentence["actions"][0]
        assert line["plan"][likely["action"]] == max(line["plan"]) == pytest.approx(likely["probability"], abs=1e-4)
    assert lines[0]["prompt"] == PROMPT and lines[0]["label"] == "label 3"
    assert [line["finished"] for line in lines] == [True] * (len(lines) - 1) + [lines[-1]["finished"]]


@pytest.mark.parametrize("selection", ["none", "uniform", "fixed"])
def test_a_text_without_a_plan_is_written_down_too(run: Path, selection: str) -> None:
    result, lines = audited(run, selection=selection)
    assert lines and all(line["plan"] is None and line["action"] is None for line in lines)
    assert lines[0]["sentence"].startswith("Rain")
    assert [one["sentence"] for one in result["plan"]] == [line["sentence"] for line in lines if selection != "none"]


def of_texts(lines: list[dict[str, Any]], key: str) -> list[Any]:
    """A key's value in the first line of each text, in the order of the file."""
    return [line[key] for line in lines if line["number"] == 0]


PROMPTS = ["Rain fell. Boats", "The cat sat on the mat. It was warm there. The town", "Nobody knew. He"]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return str(tmp_path / "prompts.txt")


@pytest.mark.parametrize("selection", ["soft", "none"])
def test_every_text_of_a_file_is_written_down(run: Path, prompts: str, selection: str) -> None:
    options = {"prompt": None, "prompts": prompts, "batch_size": 2, "max_new_tokens": 20, "selection": selection}
    result, lines = audited(run, **options)
    assert sorted(zip(of_texts(lines, "row"), of_texts(lines, "prompt"), strict=True)) == list(enumerate(PROMPTS))
    for row, one in enumerate(result["results"]):
        own = [line for line in lines if line["row"] == row]
        assert len({line["text"] for line in own}) == 1
        assert own[-1]["sentence"].endswith(one["text"].split()[-1])


def test_every_candidate_is_a_text_of_its_own(run: Path) -> None:
    result, lines = audited(run, num_plans=3, max_new_tokens=20)
    assert of_texts(lines, "sample") == [0, 1, 2] and of_texts(lines, "row") == [0, 0, 0]
    assert all(line["drawn"] == line["action"] for line in lines)
    written = sorted([line["sentence"] for line in lines if line["sample"] == sample] for sample in range(3))
    assert written == sorted([one["sentence"] for one in candidate["plan"]] for candidate in result["candidates"])


def test_what_a_call_finds_finished_is_not_written_down_again(
    run: Path, prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run.parent / "out.jsonl"
    options = {"prompt": None, "prompts": prompts, "out": str(out), "batch_size": 2, "max_new_tokens": 20}
    batch, calls = generation._batch, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return batch(*args)

    monkeypatch.setattr(generation, "_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        audited(run, **options)
    monkeypatch.setattr(generation, "_batch", batch)
    before = (run.parent / "audit.jsonl").read_text()
    assert len(of_texts([json.loads(line) for line in before.splitlines()], "row")) == 2
    audited(run, **options)
    after = (run.parent / "audit.jsonl").read_text()
    assert after.startswith(before)
    assert sorted(of_texts([json.loads(line) for line in after.splitlines()], "row")) == [0, 1, 2]
    assert len(out.read_text().splitlines()) == 3


def test_without_planner_too(
    run: Path, lm_folder: Callable[[str], str], encoder: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = PlanLMForCausalLM.from_lm(
        lm_folder("gpt2"), torch.randn(K, A), conditioned_layers=2, conditioning="bottleneck", selection="fixed"
    ).eval()
    control.encoder = encoder  # type: ignore[assignment]
    monkeypatch.setattr(generation, "load_model", lambda run: control)
    result, lines = audited(run)
    assert [line["sentence"] for line in lines] == [one["sentence"] for one in result["plan"]]
    assert lines[0]["sentence"].startswith("Rain") and lines[0]["plan"] is None


def test_the_same_text_has_the_same_name_and_no_other_has_it(run: Path) -> None:
    (first, lines), (second, more), (_, other) = audited(run), audited(run), audited(run, seed=6)
    assert first == second and lines[0]["text"] == more[0]["text"] != other[0]["text"]
    assert [line["place"] for line in lines] == list(range(2, 2 + len(lines))), "two sentences are the prompt's"


def test_a_trail_that_cannot_be_written_is_said_once(
    run: Path, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.parent / "folder"
    folder.mkdir()
    generation.generate(GenerateConfig(run=str(run), prompts=prompts, max_new_tokens=6, audit=str(folder)))
    assert capsys.readouterr().err.count("could not be written") == 1


def test_a_models_checksum_is_of_weights_settings_and_tokenizer(run: Path) -> None:
    before = model_checksum(str(run))
    assert len(before) == 64 and before == model_checksum(str(run / "model"))
    for name in ("config.json", "tokenizer.json"):
        content = (run / "model" / name).read_text()
        (run / "model" / name).write_text(content + " ")
        assert model_checksum(str(run)) != before
        (run / "model" / name).write_text(content)
    assert model_checksum(str(run)) == before
    weights = load_file(run / "model" / "model.safetensors")
    weights["adapter.bias"] = weights["adapter.bias"] + torch.eye(1, len(weights["adapter.bias"]))[0]
    save_file(weights, run / "model" / "model.safetensors", {"format": "pt"})
    assert model_checksum(str(run)) != before


def test_a_line_that_was_cut_off_spoils_no_other(run: Path) -> None:
    path = run.parent / "audit.jsonl"
    path.write_text('{"text": "half a li')
    audited(run)
    cut, *lines = path.read_text().splitlines()
    assert cut == '{"text": "half a li' and lines and all(json.loads(line)["text"] for line in lines)


def _write(path: Path, name: str) -> None:
    for number in range(50):
        append_lines(path, [json.dumps({"name": name, "number": number, "filling": name * 20_000})] * 2)


def test_two_writers_tear_no_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 200
    for name in "ab":
        own = [line["number"] for line in lines if line["name"] == name]
        assert own == [number for number in range(50) for _ in range(2)]
    assert all(line["filling"] == line["name"] * 20_000 for line in lines)


def test_a_writer_waits_for_the_other(tmp_path: Path) -> None:
    """Who is in the middle of a line ends it first: writing it may take several calls of the system."""
    path = tmp_path / "audit.jsonl"
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write('{"name": ')
        file.flush()
        writer = multiprocessing.get_context("fork").Process(target=_write, args=(path, "a"))
        writer.start()
        writer.join(0.5)
        file.write('"b"}\n')
        file.flush()
        fcntl.flock(file, fcntl.LOCK_UN)  # closing it would not do: the child has it, too
    writer.join()
    lines = [json.loads(line)["name"] for line in path.read_text().splitlines()]
    assert lines == ["b", *["a"] * 100]
