"""Loading: weights that do not fit are refused, no code of a folder runs, and files are found from anywhere."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import planlm  # noqa: F401  registers the Auto classes
from planlm.config import GenerateConfig
from planlm.errors import InputError
from planlm.model import PlanLMConfig, PlanLMForCausalLM, Planner
from planlm.model.generation import generate
from planlm.model.loading import load_lm, load_model
from planlm.pretrained.tokenizer import load_tokenizer, tokenizer_fingerprint
from tests.conftest import make_tokenizer
from tests.damage import Weights, change, configure, pickle_weights, truncate

K, A = 7, 16


@pytest.fixture(scope="module")
def joint(lm_folder: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A joint model as saved."""
    folder = tmp_path_factory.mktemp("joint") / "model"
    PlanLMForCausalLM.from_lm(lm_folder("gpt2"), torch.randn(K, A), encoder="./encoder").save_pretrained(folder)
    return folder


@pytest.fixture
def lm(lm_folder: Callable[[str], str], tmp_path: Path) -> Path:
    """A copy of an LM to damage."""
    return Path(shutil.copytree(lm_folder("gpt2"), tmp_path / "lm"))


@pytest.fixture
def model(joint: Path, tmp_path: Path) -> Path:
    """A copy of a joint model to damage."""
    return Path(shutil.copytree(joint, tmp_path / "model"))


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: tensor for key, tensor in weights.items() if not key.startswith(part)}


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + key: tensor for key, tensor in weights.items()}


def filled(part: str, value: float) -> Callable[[Weights], Weights]:
    return lambda weights: {key: it * value if key.startswith(part) else it for key, it in weights.items()}


def rounded(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: it.char() if key.startswith(part) else it for key, it in weights.items()}


def shard(folder: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="20KB")


def lose_a_shard(folder: Path) -> None:
    shard(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def without_prefix(weights: Weights) -> Weights:
    return {key.removeprefix("transformer."): 2 * it for key, it in weights.items() if "wte" in key}


def double_a_shard(folder: Path) -> None:
    shard(folder)
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    save_file(load_file(first) | load_file(second), second, metadata={"format": "pt"})


def move_a_shard(folder: Path) -> None:
    shard(folder)
    first = sorted(folder.glob("model-*.safetensors"))[0]
    first.rename(folder.parent / first.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(first.name, f"../{first.name}"))


def pipe_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    os.mkfifo(folder / "generation_config.json")


def lead_generation_config_astray(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to("nothing")


LM_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "DDP": (lambda at: change(at, prefixed("module.")), "prefix 'module.': save the inner model"),
    "torch.compile": (lambda at: change(at, prefixed("_orig_mod.")), "prefix '_orig_mod.'"),
    "missing": (lambda at: change(at, without("transformer.h.1.mlp")), r"4 missing \(transformer.h.1.mlp.c_fc.bias"),
    "extra": (lambda at: change(at, lambda w: w | {"v_head.weight": torch.ones(2)}), r"1 not of this model \(v_head"),
    "a layer more": (lambda at: configure(at, n_layer=2), r"not of this model \(transformer.h.2"),
    "another shape": (lambda at: configure(at, vocab_size=300), r"wte.weight \(400, 32\) for \(300, 32\)"),
    "a million layers": (lambda at: configure(at, n_layer=10**6), "1,000,000 layers"),
    "a huge vocabulary": (lambda at: configure(at, vocab_size=10**10), "describes 320,000,"),
    "a negative size": (lambda at: configure(at, vocab_size=-5), "negative dimension"),
    "a text for a size": (lambda at: configure(at, n_layer="three"), "expected int, got str"),
    "no heads": (lambda at: configure(at, n_head=0), "by zero"),
    "nan": (lambda at: change(at, filled("transformer.h.2", float("nan"))), r"not finite numbers \(transformer.h.2"),
    "infinity": (lambda at: change(at, filled("transformer.wpe", float("inf"))), "not finite numbers"),
    "whole numbers": (lambda at: change(at, lambda w: {key: it.char() for key, it in w.items()}), "quantised"),
    "pickled": (pickle_weights, "never unpickles"),
    "truncated": (truncate, "model.safetensors: damaged"),
    "no weights": (lambda at: (at / "model.safetensors").unlink(), "no model.safetensors"),
    "a shard lost": (lose_a_shard, "model-00002-of.*is missing"),
    "no config": (lambda at: (at / "config.json").unlink(), "model_type"),
    "config damaged": (lambda at: (at / "config.json").write_text("{"), "not a valid JSON"),
    "config too deep": (lambda at: (at / "config.json").write_text("[" * 200_000), "recursion"),
    "another family": (lambda at: configure(at, model_type="bloom"), "'bloom' is not supported"),
    "generation_config damaged": (lambda at: (at / "generation_config.json").write_text("{"), "not valid JSON"),
    "an end that is no token": (lambda at: configure(at, "generation_config.json", eos_token_id="x"), "eos_token_id"),
    "two of one name": (lambda at: change(at, lambda w: w | without_prefix(w)), r"two names.*\(wte.weight\)"),
    "a shard again": (double_a_shard, "in two files of weights"),
    "a shard elsewhere": (move_a_shard, "which is not in its folder"),
    "generation_config a pipe": (pipe_generation_config, "generation_config.json: not a file"),
    "generation_config gone astray": (lead_generation_config_astray, "generation_config.json: not a file"),
    "an end beyond all": (lambda at: configure(at, "generation_config.json", eos_token_id=10**30), "eos_token_id 1000"),
    "an adapter": (lambda at: (at / "adapter_config.json").write_text("{}"), "merge_and_unload"),
}


@pytest.mark.parametrize("damage", LM_DAMAGE)
def test_an_lm_that_does_not_fit_is_refused_in_one_line(lm: Path, damage: str) -> None:
    harm, message = LM_DAMAGE[damage]
    harm(lm)
    with pytest.raises(InputError, match=message) as caught:
        load_lm(str(lm), torch.float32)
    assert str(lm) in str(caught.value) and "\n" not in str(caught.value)


def test_an_lm_loads_with_what_old_versions_stored_in_parts_and_in_half(lm: Path) -> None:
    expected = load_lm(str(lm), torch.float32).state_dict()
    masks = {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(3)}
    masks |= {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 256, 256).bool() for layer in range(3)}
    change(lm, lambda weights: weights | masks)
    for key, tensor in load_lm(str(lm), torch.float32).state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    change(lm, lambda weights: {key: it for key, it in weights.items() if key not in masks})
    shard(lm)
    assert torch.equal(load_lm(str(lm), torch.float32).lm_head.weight, expected["lm_head.weight"])
    load_lm(str(lm), torch.bfloat16)


def test_random_numbers_are_drawn_as_without_the_checks(lm: Path) -> None:
    torch.manual_seed(1)
    load_lm(str(lm), torch.float32)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(1)))


JOINT_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no planner": (lambda at: change(at, without("planner.")), r"missing \(planner.head.bias"),
    "no codebook": (lambda at: change(at, lambda w: {k: it for k, it in w.items() if "codebook" not in k}), "codebook"),
    "no adapter": (lambda at: change(at, without("adapter.weight")), r"1 missing \(adapter.weight"),
    "no LM layer": (lambda at: change(at, without("lm.transformer.h.0.")), r"missing \(lm.transformer.h.0"),
    "DDP": (lambda at: change(at, prefixed("module.")), "prefix 'module.'"),
    "extra": (lambda at: change(at, lambda w: w | {"more": torch.ones(2)}), r"not of this model \(more"),
    "nan": (lambda at: change(at, filled("adapter", float("nan"))), "not finite"),
    "a codebook of whole numbers": (
        lambda at: change(at, rounded("adapter.codebook")),
        r"quantised.*\(adapter.codebook I8",
    ),
    "two codebooks": (lambda at: change(at, lambda w: w | {"codebook": torch.ones(K, A)}), "two codebooks"),
    "other actions": (lambda at: configure(at, num_actions=9), r"of another shape .*\(7, 16\) for \(9, 16\)"),
    "a million layers": (lambda at: configure(at, planner_layers=10**6), "1,000,003 layers"),
    "a billion actions": (lambda at: configure(at, num_actions=10**9), "describes 33,000"),
    "no text_config": (lambda at: configure(at, text_config=None), "describes 124,"),
    "pickled": (pickle_weights, "never unpickles"),
    "truncated": (truncate, "damaged"),
    "another tokenizer": (lambda at: make_tokenizer(start=True).save_pretrained(at), "tokenizer is not the one"),
}
VALUES: dict[str, object] = {
    "selection": "best", "plan_temperature": 0, "plan_top_k": 8, "gumbel_scale": -1, "num_actions": -7,
    "action_dim": "16", "planner_layers": 0, "planner_heads": 3, "planner_dropout": 1, "conditioned_layers": 9,
    "gate": "yes", "encoder": 5, "text_config": 5, "tokenizer_fingerprint": 3,
}  # fmt: skip


@pytest.mark.parametrize("damage", JOINT_DAMAGE)
def test_a_joint_model_that_does_not_fit_is_refused_in_one_line(model: Path, damage: str) -> None:
    harm, message = JOINT_DAMAGE[damage]
    harm(model)
    for load in (load_model, AutoModelForCausalLM.from_pretrained, PlanLMForCausalLM.from_pretrained):
        with pytest.raises(InputError, match=message) as caught:
            load(str(model))
        assert str(model) in str(caught.value) and "\n" not in str(caught.value)


def test_no_tensor_of_a_joint_model_may_be_missing(model: Path) -> None:
    whole = load_file(model / "model.safetensors")
    for key in whole:
        save_file({name: it for name, it in whole.items() if name != key}, model / "model.safetensors")
        with pytest.raises(InputError, match=r"1 missing|2 missing"):  # two names where the weights are tied
            load_model(str(model))


@pytest.mark.parametrize(("name", "value"), VALUES.items())
def test_values_that_no_model_can_have_are_refused_in_one_line(model: Path, name: str, value: object) -> None:
    configure(model, **{name: value})
    with pytest.raises(InputError) as caught:
        load_model(str(model))
    assert str(model) in str(caught.value) and "\n" not in str(caught.value)


def test_every_wrong_value_is_named_at_once() -> None:
    with pytest.raises(InputError, match=r"num_actions '0'.*; selection 'x': expected one of soft, hard"):
        PlanLMConfig(num_actions=0, selection="x")


def test_other_shapes_are_drawn_anew_where_the_user_asks_for_it(model: Path) -> None:
    change(model, lambda w: {k: it[:300].clone() if k == "lm.transformer.wte.weight" else it for k, it in w.items()})
    with pytest.raises(InputError, match="another shape"):
        AutoModelForCausalLM.from_pretrained(model)
    loaded, info = AutoModelForCausalLM.from_pretrained(model, ignore_mismatched_sizes=True, output_loading_info=True)
    assert loaded.lm.transformer.wte.weight.isfinite().all() and len(info["mismatched_keys"]) == 1


def test_a_model_without_a_tokenizer_says_so_when_it_is_asked(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(InputError, match="no tokenizer"):
        _ = loaded.tokenizer
    with pytest.raises(InputError, match="no tokenizer"):
        load_model(str(model))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_tokenizer_is_refused_in_one_line(model: Path, content: str) -> None:
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="tokenizer") as caught:
        load_model(str(model))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_vocabulary_is_refused(lm: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (lm / name).unlink()
    with pytest.raises(InputError, match="no vocabulary"):
        load_tokenizer(str(lm))


def test_the_actions_that_training_started_from_are_saved_and_a_folder_without_them_loads(
    model: Path, lm: Path, tmp_path: Path
) -> None:
    loaded = load_model(str(model))
    centroids = loaded.centroids
    assert torch.equal(centroids, loaded.codebook.detach()) and centroids is not loaded.codebook
    loaded.codebook.data += 1.0
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load_model(str(tmp_path / "again")).centroids, centroids)
    assert (model / "centroids.safetensors").stat().st_mode == (model / "model.safetensors").stat().st_mode
    other = PlanLMForCausalLM.from_lm(str(lm), torch.randn(K, A))
    other._centroids = None
    other.save_pretrained(tmp_path / "again")
    assert not load_model(str(tmp_path / "again")).has_centroids
    (model / "centroids.safetensors").unlink()
    with pytest.raises(InputError, match=r"model: no centroids\.safetensors"):
        _ = load_model(str(model)).centroids


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (lambda path: save_file({"centroids": torch.zeros(K, A)}, path), "not the actions that the model was trained"),
        (lambda path: save_file({"other": torch.zeros(K, A)}, path), "not the actions that the model was trained on"),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "damaged"),
    ],
)
def test_damaged_actions_are_refused_in_one_line(model: Path, damaged: Callable[[Path], object], message: str) -> None:
    damaged(model / "centroids.safetensors")
    with pytest.raises(InputError, match=rf"centroids\.safetensors: {message}") as caught:
        load_model(str(model))
    assert "\n" not in str(caught.value)


def test_folders_from_before_the_fingerprint_load(model: Path) -> None:
    configure(model, tokenizer_fingerprint="")
    other = make_tokenizer(start=True)
    other.save_pretrained(model)
    assert tokenizer_fingerprint(load_model(str(model)).tokenizer) == tokenizer_fingerprint(other)


def test_nothing_that_was_said_at_loading_is_saved_with_the_tokenizer(model: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model, token="secret").save_pretrained(tmp_path / "again")
    assert "secret" not in (tmp_path / "again" / "tokenizer_config.json").read_text()
    assert "local_files_only" not in (tmp_path / "again" / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("file", ["planner.json", "planner.safetensors"])
def test_a_planner_with_a_pipe_for_a_file_is_not_waited_for(tmp_path: Path, file: str) -> None:
    Planner(A, K, heads=2).save(tmp_path)
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    with pytest.raises(InputError, match=f"no planner here .*{file} is missing"):
        Planner.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("layers", 10**7), ("layers", 1), ("num_actions", 10**12), ("heads", 0), ("dropout", "x"), ("more", 1)],
)
def test_a_planner_that_does_not_fit_is_refused(tmp_path: Path, name: str, value: object) -> None:
    Planner(A, K, heads=2).save(tmp_path)
    configure(tmp_path, "planner.json", **{name: value})
    with pytest.raises(InputError, match="planner cannot be read") as caught:
        Planner.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        prefixed("module."),
        without("head"),
        filled("norm", float("nan")),
        lambda w: w | {"more": torch.ones(1)},
        lambda w: {key: it.char() for key, it in w.items()},
    ],
)
def test_planner_weights_that_do_not_fit_are_refused(tmp_path: Path, changed: Callable[[Weights], Weights]) -> None:
    Planner(A, K, heads=2).save(tmp_path)
    change(tmp_path, changed, "planner.safetensors")
    with pytest.raises(InputError, match="planner cannot be read"):
        Planner.load(tmp_path)


def test_a_model_is_found_from_a_subfolder_and_after_the_working_directory_changed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    loaded = [
        AutoModelForCausalLM.from_pretrained(tmp_path.name, subfolder="model"),
        AutoModelForCausalLM.from_pretrained(f"{tmp_path.name}/model"),
    ]
    monkeypatch.chdir("/")
    for number, one in enumerate(loaded):
        assert one.tokenizer("The cat").input_ids
        one.save_pretrained(tmp_path / str(number))
        assert (tmp_path / str(number) / "tokenizer.json").is_file()


@pytest.mark.parametrize(("named", "place"), [("./encoder", "model/encoder"), ("../encoder", "encoder")])
def test_an_encoder_beside_the_model_may_be_moved_with_it(
    model: Path, tmp_path: Path, named: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(model, encoder=named)
    (tmp_path / place).mkdir()
    monkeypatch.chdir("/")
    with pytest.raises(InputError, match=str(tmp_path / place)):  # there, and empty
        _ = AutoModelForCausalLM.from_pretrained(model).encoder


def test_a_local_encoder_is_remembered_by_its_absolute_path(
    lm_folder: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "encoder").mkdir()
    monkeypatch.chdir(tmp_path)
    made = PlanLMForCausalLM.from_lm(lm_folder("gpt2"), torch.randn(K, A), encoder="encoder")
    assert made.config.encoder == str(tmp_path / "encoder")


CODE = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_no_model_runs_code_of_its_own_and_nobody_is_asked(
    lm: Path, model: Path, file: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "yes")
    for folder in (lm, model):
        marker = folder / "ran"
        for name in ("evil.py", "custom_generate/generate.py", "modeling_planlm.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\ndef generate(model): pass\n")
        configure(folder, file, auto_map=CODE, **({} if known else {"model_type": "own", "tokenizer_class": "Evil"}))
        if not known:
            configure(folder, model_type="own")
        for load in (
            lambda at: load_lm(at, torch.float32),
            load_tokenizer,
            load_model,
            lambda at: generate(GenerateConfig(run=at, prompt="The cat", max_new_tokens=1, selection="none")),
        ):
            with contextlib.suppress(InputError):
                load(str(folder))
        assert not marker.exists()
    assert not asked


@pytest.mark.parametrize("answer", ["yes", None])
def test_the_command_neither_asks_nor_runs_a_models_code(
    lm: Path, lm_folder: Callable[[str], str], answer: str | None, tmp_path: Path
) -> None:
    marker = lm / "ran"
    (lm / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    configure(lm, auto_map=CODE, model_type="own")
    (tmp_path / "texts.jsonl").write_text('{"text": "One is here. Two is there."}\n')
    command = ["prepare", str(tmp_path / "texts.jsonl"), "--out", str(tmp_path / "corpus"), "--encoder", str(lm)]
    command += ["--tokenizer", lm_folder("gpt2")]
    given = {"input": f"{answer}\n" * 100} if answer else {"stdin": subprocess.DEVNULL}
    done = subprocess.run([sys.executable, "-m", "planlm", *command], capture_output=True, text=True, **given)
    assert done.returncode == 2 and "[y/N]" not in done.stdout + done.stderr
    assert not marker.exists()
    assert f"planlm: error: {lm}: " in done.stderr and "code of its own" in done.stderr and "Trace" not in done.stderr


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_a_process_that_never_imported_planlm_loads_its_folders(joint: Path, tmp_path: Path) -> None:
    done = run(
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
        f"folder, again = {str(joint)!r}, {str(tmp_path / 'again')!r}\n"
        "assert AutoTokenizer.from_pretrained(folder, trust_remote_code=False)('The cat').input_ids\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "assert type(model).__module__ == 'planlm.model.modeling' and model.tokenizer('The cat').input_ids\n"
        "model.save_pretrained(again)\n"
        "AutoModelForCausalLM.from_pretrained(again)\n"
    )
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "again")) == sorted(os.listdir(joint)), "PlanLM's sources were copied"
    assert (tmp_path / "again" / "config.json").read_text() == (joint / "config.json").read_text()


def test_after_importing_planlm_no_flag_is_needed_and_nobody_is_asked(joint: Path) -> None:
    done = run(
        "import planlm\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"for flag in ({{}}, {{'trust_remote_code': False}}, {{'trust_remote_code': True}}):\n"
        f"    model = AutoModelForCausalLM.from_pretrained({str(joint)!r}, **flag)\n"
        "    assert type(model).__module__ == 'planlm.model.modeling'\n"
        f"AutoTokenizer.from_pretrained({str(joint)!r})\n"
    )
    assert done.returncode == 0 and "[y/N]" not in done.stdout, done.stderr


def test_tensors_that_are_elsewhere_are_not_looked_into(model: Path, tmp_path: Path) -> None:
    places = {"lm": "disk", "planner": "disk", "adapter": "cpu", "codebook": "cpu"}
    names = {key.split(".")[0] for key in load_file(model / "model.safetensors")}
    loaded = AutoModelForCausalLM.from_pretrained(
        model, device_map={name: places[name] for name in names}, offload_folder=tmp_path / "offloaded"
    )
    assert loaded.lm.transformer.wte.weight.is_meta


def test_gpt2_without_its_prefix_is_the_same_model(lm: Path) -> None:
    """The hub's gpt2 is stored as the base model is."""
    GPT2LMHeadModel.from_pretrained(lm).transformer.save_pretrained(lm)
    assert load_lm(str(lm), torch.float32).config.n_layer == GPT2Config.from_pretrained(lm).n_layer
