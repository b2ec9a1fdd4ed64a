"""The text that a call plans: what a cache remembers of it, rows of several texts, embeddings in place of tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, StaticCache

from planlm.errors import InputError
from planlm.model import PlanLMForCausalLM
from planlm.model.tracking import SentenceTracker

TEXT = "The cat sat on the mat. It was warm there. Rain fell on the harbour. Boats stayed in."


@pytest.fixture(params=("gpt2", "llama"))
def model(request: pytest.FixtureRequest, lm_folder: Callable[[str], str], encoder: object) -> PlanLMForCausalLM:
    """A tiny random model with a loud plan."""
    made = PlanLMForCausalLM.from_lm(lm_folder(request.param), torch.randn(7, 16), conditioned_layers=2)
    nn.init.normal_(made.adapter.weight)
    made.encoder = encoder  # type: ignore[assignment]
    return made.eval()


@pytest.fixture
def ids(model: PlanLMForCausalLM) -> Tensor:
    found: Tensor = model.tokenizer(TEXT, return_tensors="pt").input_ids
    return found


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_copied_cache_goes_on_by_itself(model: PlanLMForCausalLM, ids: Tensor) -> None:
    cache = model(ids[:, :9], use_cache=True).past_key_values
    branch = copy.deepcopy(cache)
    other = ids.roll(3, dims=1)
    assert_close(model(ids[:, 9:], past_key_values=cache).logits, model(ids).logits[:, 9:])
    found = model(other[:, 9:], past_key_values=branch).logits
    assert_close(found[:, -1], model(torch.cat((ids[:, :9], other[:, 9:]), 1)).logits[:, -1])


@torch.no_grad()
def test_a_cache_may_be_cut(model: PlanLMForCausalLM, ids: Tensor) -> None:
    cache = model(ids[:, :12], use_cache=True).past_key_values
    cache.crop(-3)
    assert_close(model(ids[:, 9:], past_key_values=cache).logits, model(ids).logits[:, 9:])


@torch.no_grad()
def test_a_static_cache_is_remembered_too(model: PlanLMForCausalLM, ids: Tensor) -> None:
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(ids[:, :9], past_key_values=cache, use_cache=True)
    found = [model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits for at in range(9, ids.shape[1])]
    assert_close(torch.cat(found, 1), model(ids).logits[:, 9:])


@torch.no_grad()
@pytest.mark.parametrize("change", ["rows reordered", "filled by the LM", "gone on with by the LM", "rows selected"])
def test_a_cache_that_changed_is_refused(model: PlanLMForCausalLM, ids: Tensor, change: str) -> None:
    two = torch.cat((ids[:, :12], ids[:, :12].roll(2, dims=1)))
    cache = (model.lm if change == "filled by the LM" else model)(two, use_cache=True).past_key_values
    if change == "rows reordered":
        cache.reorder_cache(torch.tensor([1, 0]))
    if change == "gone on with by the LM":
        model.lm(two[:, :1], past_key_values=cache, use_cache=True)
    if change == "rows selected":
        cache.batch_select_indices(torch.tensor([1]))
    rows = 1 if change == "rows selected" else 2
    with pytest.raises(InputError, match="text behind this cache is not known"):
        model(two[:rows, :1], past_key_values=cache)


@torch.no_grad()
def test_a_static_cache_that_the_lm_filled_anew_is_refused(model: PlanLMForCausalLM, ids: Tensor) -> None:
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(ids[:, :9], past_key_values=cache, use_cache=True)
    cache.reset()
    model.lm(ids[:, 3:12], past_key_values=cache, use_cache=True)
    with pytest.raises(InputError, match="text behind this cache is not known"):
        model(ids[:, 12:13], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("text", [TEXT, "In 1905 the town was 3.5 km from St. Mary. It was full of songs."])
def test_assisted_decoding_finds_the_padding_that_transformers_finds(model: PlanLMForCausalLM, text: str) -> None:
    """Without a mask transformers takes a start token that is the padding token, too, for padding."""
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    greedy = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, assistant_model=copy.deepcopy(model), **settings), greedy)
    assert torch.equal(model.generate(ids, assistant_early_exit=2, **settings), greedy)


@torch.no_grad()
def test_a_batch_with_padding_continues_its_cache(model: PlanLMForCausalLM, ids: Tensor) -> None:
    short = model.tokenizer("Nobody knew. The", return_tensors="pt").input_ids
    pad = ids.shape[1] - short.shape[1]
    both = torch.cat((ids, nn.functional.pad(short, (pad, 0))))
    mask = torch.ones_like(both)
    mask[1, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(both, attention_mask=mask, position_ids=positions).logits
    at = ids.shape[1] - 2
    cache = model(both[:, :at], attention_mask=mask[:, :at], position_ids=positions[:, :at], use_cache=True)
    rest = model(
        both[:, at:], attention_mask=mask, position_ids=positions[:, at:], past_key_values=cache.past_key_values
    )
    assert_close(rest.logits, whole[:, at:])


@torch.no_grad()
def test_texts_behind_each_other_in_a_row_are_planned_apart(model: PlanLMForCausalLM, ids: Tensor) -> None:
    other = model.tokenizer("Nobody knew. The cat sat there.", return_tensors="pt").input_ids
    positions = torch.cat((torch.arange(ids.shape[1]), torch.arange(other.shape[1])))[None]
    together = model(torch.cat((ids, other), 1), position_ids=positions, use_cache=False).logits
    assert_close(together[:, : ids.shape[1]], model(ids).logits)
    assert_close(together[:, ids.shape[1] :], model(other).logits)


@torch.no_grad()
def test_embeddings_stand_for_their_tokens(model: PlanLMForCausalLM, ids: Tensor) -> None:
    embeds = model.get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": -1, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(inputs_embeds=embeds, **settings), model.generate(ids, **settings)[:, -9:])
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=embeds)


@torch.no_grad()
def test_a_mask_of_four_dimensions_hides_padding(model: PlanLMForCausalLM, ids: Tensor) -> None:
    width, pad = ids.shape[1], 3
    padded = nn.functional.pad(ids, (pad, 0))
    mask = torch.ones(width + pad, width + pad, dtype=torch.bool).tril()
    mask[:, :pad] = False
    positions = (torch.arange(width + pad) - pad).clamp(min=0)[None]
    for form in (mask[None, None], torch.zeros(()).where(mask, -torch.inf)[None, None]):
        found = model(padded, attention_mask=form, position_ids=positions, use_cache=False).logits
        assert_close(found[:, pad:], model(ids).logits)


@torch.no_grad()
def test_a_prompt_in_chunks_is_one_prompt(model: PlanLMForCausalLM) -> None:
    ids = model.tokenizer("It is 3.5 km. Then Dr. Smith came in! Was he", return_tensors="pt").input_ids
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, prefill_chunk_size=4, **settings), model.generate(ids, **settings))


@torch.no_grad()
def test_generation_goes_on_from_its_cache(model: PlanLMForCausalLM, ids: Tensor) -> None:
    settings = {"do_sample": False, "eos_token_id": -1, "return_dict_in_generate": True}
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **settings).sequences
    first = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, **settings)
    rest = model.generate(
        first.sequences, attention_mask=torch.ones_like(first.sequences), past_key_values=first.past_key_values,
        max_new_tokens=7, **settings,
    )  # fmt: skip
    assert torch.equal(rest.sequences, whole)


@torch.no_grad()
def test_every_row_has_its_own_forced_actions_at_every_use(model: PlanLMForCausalLM, ids: Tensor) -> None:
    short = model.tokenizer("Nobody knew. The", return_tensors="pt").input_ids
    pad = ids.shape[1] - short.shape[1]
    batch = torch.cat((ids, nn.functional.pad(short, (pad, 0))))
    mask = torch.ones_like(batch)
    mask[1, :pad] = 0
    forcing = SentenceTracker(model.tokenizer, model.encoder, [4, 2])

    def scores(rows: Tensor, mask: Tensor, tracker: SentenceTracker | None) -> Tensor:
        made = model.generate(
            rows, attention_mask=mask, tracker=tracker, max_new_tokens=8, do_sample=False, eos_token_id=-1,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return torch.stack(made.logits, dim=1)  # [B, 8, V]

    both = scores(batch, mask, forcing)
    for row, alone in enumerate((ids, short)):
        for _ in range(2):
            assert_close(scores(alone, torch.ones_like(alone), forcing)[0], both[row])
        free = scores(alone, torch.ones_like(alone), None)[0]
        assert not torch.allclose(free, both[row], atol=1e-3), "the forced actions make no difference"


def test_the_trackers_memory_grows_with_the_text_alone(model: PlanLMForCausalLM) -> None:
    import tracemalloc

    tracker = SentenceTracker(model.tokenizer, model.encoder)
    words = model.tokenizer(" cat sat on the mat.", add_special_tokens=False).input_ids
    used = []
    for length in (500, 1000):
        tokens = (words * length)[:length]
        tracemalloc.start()
        tracker.start(torch.tensor([tokens[:5]]))
        for end in range(6, length + 1):
            tracker.inputs(torch.tensor([tokens[:end]]), length=1)
        used.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert used[1] < 3 * used[0] and used[1] < 4_000_000


def test_an_unfinished_sentence_is_not_read_at_every_token(model: PlanLMForCausalLM) -> None:
    """Counted, not timed: the tokens that are decoded while a sentence without an end grows."""
    tracker = SentenceTracker(model.tokenizer, model.encoder)
    decode, read = tracker.decode, []
    tracker.decode = lambda ids: (read.append(len(ids)), decode(ids))[1]  # type: ignore[func-returns-value, method-assign]
    words = model.tokenizer(" cat sat on the mat", add_special_tokens=False).input_ids
    work = []
    for length in (500, 2000):
        tokens = (words * length)[:length]
        tracker.start(torch.tensor([tokens[:5]]))
        read.clear()
        assert tracker.track(tokens).sentences == []
        work.append(sum(read))
    assert work[1] < 6 * work[0], work  # four times the text: quadratic work would be sixteen times


def test_labels_that_are_no_tokens_are_refused(model: PlanLMForCausalLM, ids: Tensor) -> None:
    labels = ids.clone()
    labels[0, 3] = -5
    with pytest.raises(InputError, match="labels: got -5"):
        model(ids, labels=labels)
    with pytest.raises(InputError, match="labels: got 400"):
        model(ids, shift_labels=labels.clamp(min=0).masked_fill(labels == -5, 400))


def test_an_lm_with_fewer_embeddings_than_tokens_is_refused(
    lm_folder: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("small")
    lm = AutoModelForCausalLM.from_pretrained(lm_folder("gpt2"))
    lm.resize_token_embeddings(100)
    lm.save_pretrained(folder)
    PlanLMForCausalLM.from_lm(lm_folder("gpt2"), torch.randn(7, 16)).tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"tokenizer has \d+ tokens and the LM embeddings for 100"):
        PlanLMForCausalLM.from_lm(str(folder), torch.randn(7, 16))


@torch.no_grad()
def test_zeros_behind_a_text_are_invisible_where_zero_is_a_word(
    lm_folder: Callable[[str], str], encoder: object, tmp_path: Path
) -> None:
    """Scoring programs pad with zeros and give no mask; GPT-2's token 0 is an exclamation mark."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    plain.train_from_iterator([TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    assert tokenizer.decode([0]) == "!" and not tokenizer.all_special_ids
    model = PlanLMForCausalLM.from_lm(lm_folder("gpt2"), torch.randn(7, 16), conditioned_layers=2).eval()
    nn.init.normal_(model.adapter.weight)
    model.encoder, model.tokenizer = encoder, tokenizer  # type: ignore[assignment]
    texts = [
        TEXT,
        TEXT[:-1],
        "The cat sat",
        "It was warm there. Rain!",
        "Boats stayed in.\n\n",
        "It is 3.5 km. In the U.S",
    ]
    rows = [torch.tensor(tokenizer(text).input_ids) for text in texts]
    for extra in range(4):
        width = max(map(len, rows)) + extra
        padded = torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in rows])
        together = model(padded).logits
        for row, ids in enumerate(rows):
            assert_close(together[row, : len(ids)], model(ids[None]).logits[0])
