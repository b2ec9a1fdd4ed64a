"""The joint model in others' hands: transformers' decoding methods, peft, accelerate, torch.compile, copies
and threads. Each test asks for what the plain LM under it gives, or for what the model itself gives in another way."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from planlm.errors import InputError
from planlm.model import PlanLMForCausalLM
from tests.model.conftest import TEXTS, A, joint, logits, tokens

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def without_plan(model: PlanLMForCausalLM, ids: Tensor) -> Tensor:
    return logits(model, ids, selection="none")


# Output


def test_outputs_stand_in_transformers_order(model: PlanLMForCausalLM) -> None:
    ids = tokens(model)
    for return_dict in (True, False):
        plain, scored = model(ids, return_dict=return_dict), model(ids, labels=ids, return_dict=return_dict)
        assert plain[0].shape == (*ids.shape, model.config.vocab_size)
        assert scored[0].shape == () and torch.equal(scored[1], plain[0])
        assert torch.equal(scored[0], model(ids, labels=ids).loss)


def test_hidden_states_and_attentions_are_those_of_the_conditioned_lm(model: PlanLMForCausalLM) -> None:
    ids = tokens(model)
    model.set_attn_implementation("eager")
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    torch.testing.assert_close(model.get_output_embeddings()(output.hidden_states[-1]), output.logits)
    plain = model(ids, output_hidden_states=True, selection="none")
    assert not torch.allclose(output.hidden_states[-1], plain.hidden_states[-1], atol=1e-3)


def test_logits_are_kept_where_asked(model: PlanLMForCausalLM) -> None:
    ids = tokens(model)
    kept = torch.tensor([2, 5, 6])
    torch.testing.assert_close(logits(model, ids, logits_to_keep=kept), logits(model, ids)[:, kept])
    torch.testing.assert_close(logits(model, ids, logits_to_keep=2), logits(model, ids)[:, -2:])


@pytest.mark.parametrize("masked", [True, False])
def test_trailing_padding_is_invisible(model: PlanLMForCausalLM, masked: bool) -> None:
    """Scoring programs pad on the right, often without a mask."""
    rows = [tokens(model, text)[0] for text in TEXTS]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.tokenizer.pad_token_id)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    together = logits(model, padded, **({"attention_mask": mask} if masked else {}))
    for row, ids in enumerate(rows):
        torch.testing.assert_close(together[row, : len(ids)], logits(model, ids[None])[0], rtol=1e-4, atol=1e-5)


def test_labels_of_one_call_are_divided_by_the_items_of_the_whole_batch(model: PlanLMForCausalLM) -> None:
    ids = tokens(model)
    output = model(ids, labels=ids, num_items_in_batch=100)
    torch.testing.assert_close(output.loss, model(ids, labels=ids).loss * (ids.shape[1] - 1) / 100)


# Copies, threads, weights elsewhere


def test_copies_keep_the_plan(model: PlanLMForCausalLM) -> None:
    ids = tokens(model)
    expected = logits(model, ids)
    assert not torch.allclose(expected, without_plan(model, ids), atol=1e-3)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "average": torch.optim.swa_utils.AveragedModel(model).module,
        "saved": torch.load(stored, weights_only=False),
        "pickled": pickle.loads(pickle.dumps(model)),
    }
    for name, one in copies.items():
        assert torch.equal(logits(one, ids), expected), name
        with torch.no_grad():
            one.adapter.weight.zero_()
        assert torch.equal(logits(one, ids), without_plan(model, ids)), f"{name}: its own weights decide"
    assert torch.equal(logits(model, ids), expected), "and nobody else's"


def test_a_hundred_copies_and_copies_of_copies_agree(gpt2: PlanLMForCausalLM) -> None:
    ids = tokens(gpt2)
    expected = logits(gpt2, ids)
    one = gpt2
    for _ in range(100):
        one = copy.deepcopy(one)
        assert torch.equal(logits(one, ids), expected)


def test_threads_share_a_model(model: PlanLMForCausalLM) -> None:
    """500 calls, of two kinds and with five texts, from four threads: each gives what it gives alone."""
    calls: list[tuple[Tensor, dict[str, Any]]] = [(tokens(model, text), {}) for text in TEXTS]
    calls += [(calls[0][0], {"selection": "hard"}), (calls[0][0], {"selection": "none"})]
    expected = [logits(model, ids, **options) for ids, options in calls]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda at: logits(model, calls[at % 6][0], **calls[at % 6][1]), range(500))
        assert all(torch.equal(one, expected[at % 6]) for at, one in enumerate(found))


def test_a_step_with_activation_checkpointing_leaves_nothing_behind(model: PlanLMForCausalLM) -> None:
    ids = tokens(model)
    expected, plain = logits(model, ids), logits(model.lm, ids)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    assert torch.equal(logits(model.eval(), ids), expected)
    assert torch.equal(logits(model.lm, ids), plain), "the LM by itself has no plan"
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_weights_may_lie_on_disk(model: PlanLMForCausalLM, encoder: object, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    ids = tokens(model)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "model")
    tops = {name.split(".")[0] for name, _ in model.named_parameters()}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=dict.fromkeys(tops, "disk") | {"lm": "cpu"}, offload_folder=tmp_path / "offload"
    ).eval()
    offloaded.encoder = encoder
    assert any(value.is_meta for value in offloaded.parameters())
    torch.testing.assert_close(logits(offloaded, ids), expected)
    accelerate.disk_offload(model, tmp_path / "all", execution_device=torch.device("cpu"))
    assert all(value.is_meta for value in model.parameters())
    torch.testing.assert_close(logits(model, ids), expected)


def test_embeddings_are_resized_on_both_ends(model: PlanLMForCausalLM, encoder: object, tmp_path: Path) -> None:
    ids, size = tokens(model), model.config.vocab_size + 8
    expected = logits(model, ids)
    model.resize_token_embeddings(size)
    assert len(model.get_input_embeddings().weight) == len(model.get_output_embeddings().weight) == size
    assert model.config.vocab_size == model.lm.config.vocab_size == size
    torch.testing.assert_close(logits(model, ids)[..., : size - 8], expected)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    loaded.encoder = encoder
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_compiling_traces_neither_tokenizer_nor_encoder(gpt2: PlanLMForCausalLM, encoder: Any) -> None:
    class Untraced:
        dim = encoder.dim

        def encode(self, sentences: list[str]) -> Any:
            assert not torch.compiler.is_compiling()
            return encoder.encode(sentences)

    expected = [logits(gpt2, tokens(gpt2, text)) for text in TEXTS]
    gpt2.encoder = Untraced()  # type: ignore[assignment]
    torch._dynamo.reset()
    compiled = torch.compile(gpt2, backend="aot_eager")
    for text, wanted in zip(TEXTS, expected, strict=True):
        torch.testing.assert_close(logits(compiled, tokens(gpt2, text)), wanted, rtol=1e-4, atol=1e-5)


# peft


def adapted(model: PlanLMForCausalLM, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("target", [["c_attn"], ["c_proj"], "all-linear", None])
def test_lora_computes_the_same_merged(gpt2: PlanLMForCausalLM, target: list[str] | str | None) -> None:
    """None: peft's own choice for the family."""
    ids = tokens(gpt2)
    before = logits(gpt2, ids)
    lora = adapted(gpt2, target_modules=target)
    apart = logits(lora, ids)
    assert not torch.allclose(apart, before, atol=1e-3), "the adapter must change something"
    with lora.disable_adapter():
        torch.testing.assert_close(logits(lora, ids), before)
    torch.testing.assert_close(logits(lora.merge_and_unload(), ids), apart, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_planner_and_adapter_can_be_trained_and_saved_beside_lora(
    lm_folder: Callable[[str], str], encoder: object, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    saved = {"target_modules": ["c_attn"], "modules_to_save": ["planner", "adapter"]}
    model = joint(lm_folder("gpt2"), encoder)
    ids = tokens(model)
    lora = adapted(model, **saved)
    lora(input_ids=ids, labels=ids).loss.backward()
    trained = {name: value for name, value in lora.named_parameters() if "modules_to_save" in name}
    for room in ("planner", "adapter"):
        gradients = [value.grad for name, value in trained.items() if f".{room}." in name]
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients), room
    before = logits(lora, ids)
    with torch.no_grad():
        for value in trained.values():
            value.add_(0.3 * torch.randn_like(value))
    after = logits(lora, ids)
    assert not torch.allclose(before, after, atol=1e-3), "the copies that are trained are those that are used"
    lora.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(joint(lm_folder("gpt2"), encoder), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, ids), after)
    torch.testing.assert_close(logits(lora.merge_and_unload(), ids), after, rtol=1e-4, atol=1e-4)


def test_prompts_can_be_tuned(model: PlanLMForCausalLM) -> None:
    """The virtual tokens get a gradient, and what follows them is the same text with the same plan."""
    peft = pytest.importorskip("peft")
    ids = tokens(model)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(model, config).eval()
    output = tuned(input_ids=ids, labels=ids)
    assert output.logits.shape[1] == ids.shape[1] + 3
    output.loss.backward()
    assert tuned.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0
    plain = tuned(input_ids=ids, selection="none").logits
    assert not torch.allclose(output.logits[:, 3:], plain[:, 3:], atol=1e-3), "the text behind them is planned"


# Decoding


class Prose:
    """Leaves an untrained LM the choice of a few words, with a full stop at every sixth position."""

    def __init__(self, model: PlanLMForCausalLM) -> None:
        words = model.tokenizer(" The cat sat on mat was warm there Boats", add_special_tokens=False).input_ids
        self.words = torch.tensor(sorted(set(words)))
        self.stop = torch.tensor(model.tokenizer(".", add_special_tokens=False).input_ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = self.stop if input_ids.shape[1] % 6 == 0 else self.words
        masked = torch.full_like(scores, -torch.inf)
        masked[:, allowed] = scores[:, allowed]
        return masked


@pytest.mark.parametrize("steps", [1, 3])
def test_a_loop_of_ones_own_continues_a_cache(model: PlanLMForCausalLM, steps: int) -> None:
    """A text in pieces, `steps` tokens each behind the first five, gives the logits of the text at once."""
    ids = tokens(model)
    output = model(ids[:, :5], use_cache=True)
    found = [output.logits]
    for at in range(5, ids.shape[1], steps):
        output = model(ids[:, at : at + steps], past_key_values=output.past_key_values, use_cache=True)
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), model(ids).logits, rtol=1e-4, atol=1e-5)


def test_two_caches_of_one_model_do_not_mix(model: PlanLMForCausalLM) -> None:
    texts = [tokens(model, text) for text in TEXTS[:2]]
    outputs = [model(ids[:, :5], use_cache=True) for ids in texts]
    for at in range(5, 12):
        outputs = [
            model(ids[:, at : at + 1], past_key_values=output.past_key_values, use_cache=True)
            for ids, output in zip(texts, outputs, strict=True)
        ]
        for ids, output in zip(texts, outputs, strict=True):
            torch.testing.assert_close(
                output.logits[:, -1], model(ids[:, : at + 1]).logits[:, -1], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("text", [TEXTS[0], "It is 3.5 km. Then", "Dr. Smith came in! Was he late? Mr"])
@pytest.mark.parametrize("way", ["prompt lookup", "joint assistant", "plain assistant"])
def test_assisted_decoding_is_greedy_decoding(model: PlanLMForCausalLM, way: str, text: str, encoder: object) -> None:
    ids = tokens(model, text)
    settings = GREEDY | {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40}
    greedy = model.generate(ids, logits_processor=[Prose(model)], **settings)
    assert greedy.shape[1] == ids.shape[1] + 40
    assistant = copy.deepcopy(model)
    with torch.no_grad():  # agrees often, but not always
        for value in assistant.parameters():
            value.add_(0.02 * torch.randn_like(value))
    helper: dict[str, Any] = {
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
        "joint assistant": {"assistant_model": assistant},
        "plain assistant": {"assistant_model": assistant.lm},
    }[way]
    assert torch.equal(model.generate(ids, logits_processor=[Prose(model)], **settings, **helper), greedy)


def test_beams_and_samples_of_a_batch_are_those_of_each_row(model: PlanLMForCausalLM) -> None:
    model.tokenizer.padding_side = "left"
    batch = model.tokenizer(list(TEXTS[:3]), return_tensors="pt", padding=True, return_token_type_ids=False)
    settings = GREEDY | {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(**batch, **settings)[:, -12:].reshape(3, 2, 12)
    for row, text in enumerate(TEXTS[:3]):
        ids = tokens(model, text)
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, -12:]
        assert torch.equal(together[row], alone)


def test_continuous_batching_is_refused(model: PlanLMForCausalLM) -> None:
    ids = tokens(model)
    with pytest.raises(InputError, match="continuous batching"):
        model.generate_batch([ids[0].tolist()], max_new_tokens=3)
    with pytest.raises(InputError, match="continuous batching"):
        model.generate(ids, cache_implementation="paged", max_new_tokens=3, **GREEDY)


# Empty texts


def test_a_start_token_alone_is_planned_without_context(model: PlanLMForCausalLM) -> None:
    ids = torch.tensor([[0]])
    planned = logits(
        model, ids, segment_ids=torch.tensor([[0]]), segment_rows=torch.tensor([[0, 0]]),
        sentence_embeddings=torch.zeros(1, 1, A),
    )  # fmt: skip
    torch.testing.assert_close(logits(model, ids), planned)


def test_generation_needs_no_prompt(model: PlanLMForCausalLM) -> None:
    settings = GREEDY | {"max_new_tokens": 5, "pad_token_id": 5}  # or the start token would be taken for padding
    from_start = model.generate(torch.tensor([[0]]), attention_mask=torch.ones(1, 1, dtype=torch.long), **settings)
    assert from_start.shape == (1, 6)
    assert torch.equal(model.generate(**settings), from_start)


def test_a_batch_may_hold_an_empty_prompt(model: PlanLMForCausalLM) -> None:
    ids = tokens(model)
    settings = GREEDY | {"max_new_tokens": 5}
    batch = torch.cat((torch.zeros_like(ids), ids))
    mask = torch.stack((torch.zeros_like(ids[0]), torch.ones_like(ids[0])))
    output = model.generate(batch, attention_mask=mask, **settings)
    assert torch.equal(output[1:], model.generate(ids, attention_mask=torch.ones_like(ids), **settings))
