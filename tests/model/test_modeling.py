"""The joint model's invariants: causality, alignment, the plan switched off, gradients, saving."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import planlm  # noqa: F401  registers the Auto classes
from planlm import speedups
from planlm.errors import InputError
from planlm.model import PlanLMConfig, PlanLMForCausalLM
from planlm.model.configuration import BY_LAYER
from planlm.model.families import OUTPUT_PROJECTIONS, set_dropout
from planlm.plan_inputs import PlanInputs
from planlm.selections import SELECTIONS

FAMILIES = ("gpt2", "llama")
CONDITIONED = [name for name in SELECTIONS if name != "none"]
OF_A_TEXT = [name for name in CONDITIONED if not (SELECTIONS[name].needs_oracle or SELECTIONS[name].needs_others)]
K, A = 7, 16


WAYS = {
    "adapter": {},
    "per-layer": {"codebook_per_layer": True, "gate": True},
    "embedding": {"conditioning": "embedding", "gate": True},
    "insert": {"conditioning": "insert"},
}
"""Options of the conditionings that have a plan."""
BOTTLENECK = {"conditioning": "bottleneck", "selection": "fixed"}


def joint_model(folder: str, encoder: object, **options: object) -> PlanLMForCausalLM:
    """A joint model over a tiny LM whose plan is loud: every part that starts at zero is random."""
    model = PlanLMForCausalLM.from_lm(
        folder, torch.randn(K, A), conditioned_layers=2, plan_top_k=3, encoder="none", **options
    )
    loud = 1.0 if model.config.conditioning in BY_LAYER else 0.1  # token embeddings have 0.02
    for name, parameter in model.adapter.named_parameters():
        if "codebook" not in name:
            torch.nn.init.normal_(parameter, std=loud)
    model.encoder = encoder  # type: ignore[assignment]
    return model.eval()


def batch() -> dict[str, Tensor]:
    """Two windows with 2 and 2 segments, the second one padded."""
    return {
        "input_ids": torch.randint(0, 300, (2, 10)),
        "segment_ids": torch.tensor([[0] * 5 + [1] * 5, [2] * 5 + [3] * 4 + [-1]]),
        "segment_rows": torch.tensor([[0, 0], [0, 1], [1, 1], [1, 2]]),
        "sentence_embeddings": torch.nn.functional.normalize(torch.randn(2, 4, A), dim=-1),
        "actions": torch.tensor([1, 2, 3, 4]),
        "shuffled_rows": torch.tensor([[1, 0], [1, 1], [0, 1], [0, 2]]),
    }


@pytest.mark.parametrize(
    ("selection", "way"),
    [(name, "adapter") for name in OF_A_TEXT] + [("soft", way) for way in WAYS if way != "adapter"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_changing_a_sentence_changes_no_plan_before_it(
    family: str, selection: str, way: str, lm_folder: Callable[[str], str], encoder: object
) -> None:
    """Perturb sentence j's tokens and embedding: logits up to the position before its first token stay bit for bit."""
    model = joint_model(lm_folder(family), encoder, **WAYS[way])
    words = "The cat sat on the mat. It was warm there. Rain fell on the harbour. Boats stayed in."
    changed = words.replace("Rain fell on the harbour", "Nobody knew of the school")
    for text_a, text_b in ((words, changed),):
        ids_a, ids_b = (model.tokenizer(text, return_tensors="pt").input_ids for text in (text_a, text_b))
        same = next(t for t in range(ids_a.shape[1]) if ids_a[0, t] != ids_b[0, t])
        # Equal lengths keep the arithmetic's shapes, and so its rounding, the same.
        width = min(ids_a.shape[1], ids_b.shape[1])
        torch.manual_seed(1)
        out_a = model(ids_a[:, :width], selection=selection)
        torch.manual_seed(1)
        out_b = model(ids_b[:, :width], selection=selection)
        assert torch.equal(out_a.logits[:, : same - 1], out_b.logits[:, : same - 1])
        assert not torch.equal(out_a.logits[:, same:], out_b.logits[:, same:])
        if out_a.action_logits is not None:  # sentences 0, 1, 2 are planned without sentence 2; sentence 3 is not
            torch.testing.assert_close(out_a.action_logits[:3], out_b.action_logits[:3], rtol=0, atol=0)
            assert not torch.allclose(out_a.action_logits[3], out_b.action_logits[3])


@pytest.mark.parametrize("selection", CONDITIONED)
def test_segments_that_fill_a_batch_change_nothing(
    selection: str, lm_folder: Callable[[str], str], encoder: object
) -> None:
    """Loaders put segments behind those that positions have; they have no action, and count neither here nor there."""
    model, inputs = joint_model(lm_folder("gpt2"), encoder), batch()
    labels = torch.randint(0, 300, (2, 10))
    fillers = {
        "segment_rows": torch.cat([inputs["segment_rows"], torch.zeros(2, 2, dtype=torch.int64)]),
        "actions": torch.cat([inputs["actions"], torch.tensor([-1, -1])]),
        "shuffled_rows": torch.cat([inputs["shuffled_rows"], torch.zeros(2, 2, dtype=torch.int64)]),
    }
    losses, gradients = [], []
    for given in (inputs, inputs | fillers):
        output = model(**given, shift_labels=labels, selection=selection, want_oracle_nll=True)
        assert output.nll_sum is not None and output.oracle_nll is not None
        losses.append(torch.stack((output.nll_sum, output.oracle_nll.sum())))
        losses[-1].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_shuffled_is_the_other_documents_soft_plan(lm_folder: Callable[[str], str], encoder: object) -> None:
    """And the planner's cross-entropy, the one part that trains it, is that of its own document's prediction."""
    model, inputs = joint_model(lm_folder("gpt2"), encoder), batch()
    others = inputs.pop("shuffled_rows")
    with pytest.raises(InputError, match="selection 'shuffled': a text alone has no other document's plans"):
        model(**inputs, selection="shuffled")
    found = model(**inputs, shuffled_rows=others, selection="shuffled")
    soft, swapped = model(**inputs, selection="soft"), model(**{**inputs, "segment_rows": others}, selection="soft")
    torch.testing.assert_close(found.logits, swapped.logits)
    assert (found.logits - soft.logits).abs().max() > 0.1
    torch.testing.assert_close((found.oracle_nll, found.action_logits), (soft.oracle_nll, soft.action_logits))
    gradients = []
    for output in (found, soft):
        model.zero_grad()
        output.oracle_nll.sum().backward()
        gradients.append(model.planner.head.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_plan_switches_at_the_position_that_predicts_a_sentence(
    family: str, way: str, lm_folder: Callable[[str], str], encoder: object
) -> None:
    """Another plan for segment 1 changes logits from its first position on, and not one position earlier."""
    model, inputs = joint_model(lm_folder(family), encoder, **WAYS[way]), batch()
    before = model(**inputs, selection="oracle").logits
    after = model(**{**inputs, "actions": torch.tensor([1, 5, 3, 4])}, selection="oracle").logits
    assert torch.equal(before[0, :5], after[0, :5])
    assert not torch.equal(before[0, 5], after[0, 5])
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("way", [*WAYS, "bottleneck"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plan_off_is_the_plain_lm_bit_for_bit(
    family: str, way: str, lm_folder: Callable[[str], str], encoder: object
) -> None:
    folder = lm_folder(family)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, inputs = joint_model(folder, encoder, **WAYS.get(way, BOTTLENECK)), batch()
    for parameter in model.lm.parameters():
        parameter.requires_grad_(False)
    expected = plain(inputs["input_ids"]).logits
    assert torch.equal(model(inputs["input_ids"], selection="none").logits, expected)
    measured = model(**inputs, selection="none", want_oracle_nll=True)
    assert torch.equal(measured.logits, expected), "asking the planner for its loss must not condition the LM"
    assert (measured.oracle_nll is None) == (way == "bottleneck")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(**inputs, shift_labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model(inputs["input_ids"], selection="none").logits, expected)


@pytest.mark.parametrize(
    ("selection", "way"), [(name, "adapter") for name in CONDITIONED] + [("soft", way) for way in WAYS]
)
def test_lm_loss_reaches_the_planner_where_it_should(
    selection: str, way: str, lm_folder: Callable[[str], str], encoder: object
) -> None:
    model, inputs = joint_model(lm_folder("gpt2"), encoder, **WAYS[way]).train(), batch()
    model(**inputs, shift_labels=inputs["input_ids"], selection=selection).nll_sum.backward()
    reached = any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.planner.parameters())
    assert reached == SELECTIONS[selection].trains_planner
    assert model.adapter.weight.grad is not None
    assert model.codebook.grad.abs().sum() > 0


def test_loss_and_token_nll_agree_with_transformers(lm_folder: Callable[[str], str], encoder: object) -> None:
    model, inputs = joint_model(lm_folder("llama"), encoder), batch()
    labels = inputs["input_ids"].clone()
    labels[0, :3] = -100
    output = model(**inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    torch.testing.assert_close(output.token_nll[:, :-1].flatten(), expected)
    torch.testing.assert_close(output.loss, expected.sum() / (labels[:, 1:] != -100).sum())


@pytest.mark.parametrize(
    ("way", "attention"),
    [("adapter", "sdpa"), ("embedding", "sdpa"), ("insert", "sdpa"), ("insert", "eager"), ("insert", "plain sdpa")],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_windows_packed_into_a_row_do_not_see_each_other(
    family: str,
    way: str,
    attention: str,
    lm_folder: Callable[[str], str],
    encoder: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses and gradients of two windows in one row are those of two rows."""
    model = joint_model(lm_folder(family), encoder, **WAYS[way])
    model.set_attn_implementation(attention.split()[-1])
    if attention == "plain sdpa":
        monkeypatch.setattr(speedups, "ON", speedups.ON - {"attention"})
    inputs = batch()
    length = 9  # of the second window; the first one has 10
    apart = inputs | {"shift_labels": torch.randint(0, 300, (2, 10))}
    apart["shift_labels"][1, length:] = -100
    packed = inputs | {
        name: torch.cat((apart[name][0], apart[name][1, :length]))[None]
        for name in ("input_ids", "segment_ids", "shift_labels")
    }
    packed["position_ids"] = torch.cat((torch.arange(10), torch.arange(length)))[None]
    losses, gradients = [], []
    for given in (apart, packed):
        output = model(**given, selection="soft", use_cache=False)
        output.nll_sum.backward()
        losses.append(output.token_nll.flatten()[: 10 + length])
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-4, msg=name)
    unmarked = model(**(packed | {"position_ids": torch.arange(10 + length)[None]}), selection="soft", use_cache=False)
    assert not torch.allclose(unmarked.token_nll[0, 10:], losses[0][10:], atol=1e-3), "positions make no difference"


def test_plan_inputs_come_whole_or_by_name(lm_folder: Callable[[str], str], encoder: object) -> None:
    """By name, as tracing and collators of tensors have them, they replace those of `plan` or of the text."""
    model, inputs = joint_model(lm_folder("llama"), encoder), batch()
    ids, other = inputs.pop("input_ids"), torch.tensor([0, 5, 3, 4])
    whole = PlanInputs(**inputs)
    expected = model(ids, plan=whole, selection="oracle").logits
    assert torch.equal(model(ids, **inputs, selection="oracle").logits, expected)
    changed = model(ids, plan=whole, actions=other, selection="oracle").logits
    assert torch.equal(changed, model(ids, **(inputs | {"actions": other}), selection="oracle").logits)
    assert not torch.equal(changed, expected)
    with pytest.raises(TypeError, match="segment_rows"):
        model(ids, segment_ids=inputs["segment_ids"])
    text = model.tokenizer("The cat sat.", return_tensors="pt").input_ids
    first, second = (model(text, actions=torch.tensor([one, 2]), selection="oracle").logits for one in (1, 4))
    assert not torch.equal(first, second)


def test_plans_the_text_by_itself_as_a_prepared_batch_does(lm_folder: Callable[[str], str], encoder: object) -> None:
    model = joint_model(lm_folder("llama"), encoder)
    ids = model.tokenizer("The cat sat. It was warm.", return_tensors="pt").input_ids
    first = len(model.tokenizer("The cat sat.").input_ids)  # start token included
    segments = torch.tensor([[0] * (first - 1) + [1] * (ids.shape[1] - first) + [2]])
    before = torch.from_numpy(model.encoder.encode(["The cat sat.", "It was warm."]))
    embeddings = torch.cat((torch.zeros(1, A), before))[None]
    rows = torch.tensor([[0, 0], [0, 1], [0, 2]])
    prepared = model(ids, segment_ids=segments, segment_rows=rows, sentence_embeddings=embeddings)
    assert torch.equal(model(ids).logits, prepared.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_gives_the_same_logits_in_a_new_process(
    family: str, lm_folder: Callable[[str], str], encoder: object, tmp_path: Path
) -> None:
    model, inputs = joint_model(lm_folder(family), encoder, gate=True, plan_temperature=1.5), batch()
    torch.nn.init.normal_(model.adapter.gate)
    model.save_pretrained(tmp_path / "model")
    torch.save({"inputs": inputs, "logits": model(**inputs).logits}, tmp_path / "expected.pt")
    script = (
        "import sys, torch, planlm; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/model').eval()\n"
        "stored = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert type(model).__name__ == 'PlanLMForCausalLM'\n"
        "assert torch.equal(model(**stored['inputs']).logits, stored['logits'])\n"
        "assert model.tokenizer is not None\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unsupported_family_is_refused_with_the_list(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"bloom.*GPT-2, OLMo"):
        PlanLMForCausalLM.from_lm(str(tmp_path), torch.randn(K, A))


@pytest.mark.parametrize("layers", [0, 4])
def test_too_many_conditioned_layers_are_refused(layers: int, lm_folder: Callable[[str], str]) -> None:
    with pytest.raises(InputError, match="the LM has 3; set 1 to 3"):
        PlanLMForCausalLM.from_lm(lm_folder("gpt2"), torch.randn(K, A), conditioned_layers=layers)


def tiny_config(model_type: str) -> PretrainedConfig:
    """A family's configuration at a size that builds in milliseconds."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    shape |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # some families' own are beyond 50
    if model_type != "gpt2":
        shape |= {"intermediate_size": 64}
    if model_type not in ("gpt2", "gpt_neox"):
        shape |= {"num_key_value_heads": 2}
    return AutoConfig.for_model(model_type, **shape)


@pytest.mark.parametrize("model_type", sorted(OUTPUT_PROJECTIONS))
def test_every_family_is_conditioned(model_type: str) -> None:
    """A tiny random model of each family: the plan changes the logits, switched off it does not."""
    config = PlanLMConfig(
        text_config=tiny_config(model_type), num_actions=K, action_dim=A, planner_heads=2, conditioned_layers=2
    )
    model = PlanLMForCausalLM(config).eval()
    torch.nn.init.normal_(model.adapter.weight)
    torch.nn.init.normal_(model.codebook)
    inputs = batch()
    inputs["input_ids"] %= 50
    plain = model.lm(inputs["input_ids"]).logits
    switched_off = torch.equal(model(inputs["input_ids"], selection="none").logits, plain)
    assert switched_off, "the family does more behind its last hidden state than the head's product (a scale, a cap)"
    reached = not torch.allclose(model(**inputs).logits, plain)
    assert reached, "the family's attention does not call transformers' attention interface with what the LM was given"


@pytest.mark.parametrize("model_type", sorted(OUTPUT_PROJECTIONS))
def test_dropout_of_every_family_is_set(model_type: str) -> None:
    lm = AutoModelForCausalLM.from_config(tiny_config(model_type)).train()
    ids = torch.randint(0, 50, (2, 12))
    set_dropout(lm, 0.5)
    assert not torch.equal(lm(ids).logits, lm(ids).logits)
    set_dropout(lm, 0.0)
    first, second = lm(ids).logits, lm(ids).logits
    assert torch.equal(first, second) and torch.equal(first, lm.eval()(ids).logits)


def test_folders_from_before_the_codebook_moved_are_read(
    lm_folder: Callable[[str], str], encoder: object, tmp_path: Path
) -> None:
    model, inputs = joint_model(lm_folder("gpt2"), encoder), batch()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["codebook"] = stored.pop("adapter.codebook")
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = PlanLMForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    loaded.save_pretrained(tmp_path)
    assert "adapter.codebook" in load_file(tmp_path / "model.safetensors")


def test_what_is_saved_may_be_read_by_whom_the_folder_lets(
    lm_folder: Callable[[str], str], encoder: object, tmp_path: Path
) -> None:
    model = joint_model(lm_folder("gpt2"), encoder)
    for mask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(mask)
        try:
            model.save_pretrained(tmp_path / f"model-{mode}")
            model.planner.save(tmp_path / f"planner-{mode}")
        finally:
            os.umask(before)
        for folder in (f"model-{mode}", f"planner-{mode}"):
            assert {file.stat().st_mode & 0o777 for file in (tmp_path / folder).iterdir()} == {mode}
