"""What users switch on or hang into a causal LM, beside which the joint model does as its LM does, or says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from planlm.errors import InputError
from planlm.model import PlanLMForCausalLM

TEXT = "The cat sat on the mat. It was warm there. Rain fell on the harbour."


@pytest.fixture(params=("gpt2", "llama"))
def folder(request: pytest.FixtureRequest, lm_folder: Callable[[str], str]) -> str:
    return lm_folder(request.param)


@pytest.fixture
def lm(folder: str) -> PreTrainedModel:
    return without_dropout(AutoModelForCausalLM.from_pretrained(folder))


@pytest.fixture
def model(folder: str, encoder: object) -> PlanLMForCausalLM:
    made = PlanLMForCausalLM.from_lm(folder, torch.randn(7, 16), conditioned_layers=2)
    nn.init.normal_(made.adapter.weight)
    made.encoder = encoder  # type: ignore[assignment]
    return without_dropout(made)  # type: ignore[return-value]


@pytest.fixture
def ids(model: PlanLMForCausalLM) -> Tensor:
    found: Tensor = model.tokenizer(TEXT, return_tensors="pt").input_ids
    return found


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


@pytest.mark.parametrize(
    ("setting", "output", "there"),
    [
        ("output_hidden_states", "hidden_states", True),
        ("output_attentions", "attentions", True),
        ("use_cache", "past_key_values", False),
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_the_configuration_says_what_calls_return(
    model: PlanLMForCausalLM, ids: Tensor, tmp_path: Path, setting: str, output: str, there: bool, loaded: bool
) -> None:
    assert (getattr(model(ids), output) is None) == there
    if loaded:
        model.save_pretrained(tmp_path)
        encoder, options = model.encoder, {"attn_implementation": "eager", setting: there}
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        model.encoder = encoder
    else:
        model.set_attn_implementation("eager")
        setattr(model.config, setting, there)
    assert (getattr(model(ids), output) is not None) == there
    assert getattr(model(ids, **{setting: not there}), output) is None or not there  # a call's own word counts


def test_labels_are_smoothed_as_a_causal_lms(
    model: PlanLMForCausalLM, lm: PreTrainedModel, ids: Tensor, tmp_path: Path
) -> None:
    model.config.selection = "none"
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, eval_dataset=[{"input_ids": ids[0], "labels": ids[0]}])
    assert trainer.label_smoother is not None
    # Not transformers' Trainer on the LM: that takes GPT-2's labels for shifted ones when it counts them.
    expected = trainer.label_smoother(lm(ids), ids, shift_labels=True)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("scored", ["labels", "shift_labels"])
def test_every_hook_on_gradients_is_called(
    model: PlanLMForCausalLM, lm: PreTrainedModel, ids: Tensor, scored: str
) -> None:
    labels = nn.functional.pad(ids, (0, 1), value=-100)[:, 1:] if scored == "shift_labels" else ids
    called: dict[PreTrainedModel, set[str]] = {}
    for one, inputs in ((lm, {"labels": ids}), (model.lm, {scored: labels})):
        called[one] = set()
        for name, module in one.named_modules():
            if not list(module.children()):
                module.register_full_backward_hook(lambda *_, name=name, of=called[one]: of.add(name))
        (model if one is model.lm else one)(ids, **inputs).loss.backward()
    assert called[model.lm] == called[lm] != set()


@pytest.mark.parametrize("selection", ["soft", "none"])
@pytest.mark.parametrize("kinds", [False, True])
def test_masks_of_whole_numbers_in_four_dimensions_are_refused(
    model: PlanLMForCausalLM, ids: Tensor, selection: str, kinds: bool
) -> None:
    width = ids.shape[1]
    seen = torch.ones(1, 1, width, width, dtype=torch.long).tril()
    with pytest.raises(InputError, match=r"attention_mask: 4 dimensions of torch.int64"):
        model(ids, attention_mask={"full_attention": seen} if kinds else seen, selection=selection)
    found, expected = model(ids, attention_mask=seen.bool()).logits, model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class _Logits(nn.Module):
    """What tracing takes: tensors alone, in and out."""

    def __init__(self, model: PlanLMForCausalLM, **inputs: object) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, ids: Tensor) -> Tensor:
        """`[B, W]` to `[B, W, V]`."""
        logits: Tensor = self.model(ids, use_cache=False, **self.inputs).logits
        return logits


@pytest.mark.parametrize("way", ["trace", "export"])
@torch.no_grad()
def test_sentences_are_not_frozen_into_a_traced_model(model: PlanLMForCausalLM, ids: Tensor, way: str) -> None:
    def frozen(module: nn.Module) -> Callable[[Tensor], Tensor]:
        if way == "trace":
            return torch.jit.trace(module, ids, check_trace=False)  # type: ignore[no-any-return]
        return torch.export.export(module, (ids,)).module()

    with pytest.raises(InputError, match="segment_ids, segment_rows and sentence_embeddings"):
        frozen(_Logits(model))
    plan = {
        "segment_ids": (torch.arange(ids.shape[1]) // 9)[None],
        "segment_rows": torch.tensor([[0, at] for at in range(ids.shape[1] // 9 + 1)]),
        "sentence_embeddings": torch.randn(1, ids.shape[1] // 9 + 1, 16),
    }
    planned, other = _Logits(model, **plan), ids.roll(3, dims=1)
    torch.testing.assert_close(frozen(planned)(other), planned(other), rtol=1e-4, atol=1e-5)


def test_guidance_follows_the_selection_of_generate(model: PlanLMForCausalLM, lm: PreTrainedModel, ids: Tensor) -> None:
    options = {"guidance_scale": 3.0, "max_new_tokens": 16, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    found = model.generate(ids, selection="none", **options)
    expected = lm.generate(ids, **options)
    assert found.equal(expected)
    hard = model.generate(ids, selection="hard", **options)
    model.config.selection = "hard"
    assert hard.equal(model.generate(ids, **options))
