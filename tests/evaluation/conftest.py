"""A tiny prepared corpus and a run directory, made without `planlm prepare` and `planlm train`."""

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from planlm.corpus.store import CODEBOOK, FORMAT_VERSION, Manifest, PreparedCorpus, document_features, write_manifest
from planlm.model import PlanLMForCausalLM
from planlm.pretrained.tokenizer import load_tokenizer, tokenizer_fingerprint
from planlm.text.alignment import tokenize
from planlm.text.sentences import split_sentences

K, A = 7, 16
SENTENCES = (
    "The cat sat on the mat.", "It was warm there.", "Rain fell on the harbour for three days.", "Boats stayed in.",
    "The café was full of readers.", "In 1905 the town had a mill, a school and a church.", "Nobody knew.",
    "Its people traded wool with Norway.",
)  # fmt: skip


def make_texts(split):
    """Documents of 1 to 14 sentences; the longest has several windows."""
    generator = np.random.default_rng(len(split))
    return [" ".join(generator.choice(SENTENCES, size=size)) for size in (3, 14, 1, 7, 2, 9, 5, 11)]


@pytest.fixture
def make_corpus(lm_folder, encoder, tmp_path):
    """Prepare a corpus for the tokenizer of a family's tiny LM."""

    def make(family="gpt2", name="corpus", splits=("train", "validation", "test"), num_actions=K, **extra):
        folder, tokenizer = tmp_path / name, load_tokenizer(lm_folder(family))
        codebook = torch.randn(num_actions, A, generator=torch.Generator().manual_seed(1))
        rows = {}
        for split in splits:
            rows[split] = []
            for number, text in enumerate(extra.get(split, make_texts(split))):
                spans = split_sentences(text)
                ids, counts = tokenize(tokenizer, text, spans)
                embeddings = encoder.encode([text[begin:end] for begin, end in spans])
                actions = torch.cdist(torch.from_numpy(embeddings), codebook).argmin(dim=1).tolist()
                rows[split].append(
                    {"id": f"{split}-{number}", "text": text, "input_ids": ids, "sentence_spans": spans,
                     "sentence_tokens": counts, "embeddings": embeddings.astype(np.float16), "actions": actions}
                )  # fmt: skip
        features = document_features(A)
        documents = {split: datasets.Dataset.from_list(items, features=features) for split, items in rows.items()}
        datasets.DatasetDict(documents).save_to_disk(str(folder))
        save_file({"codebook": codebook}, folder / CODEBOOK)
        counts = {
            split: {
                "documents": len(items),
                "sentences": sum(len(item["actions"]) for item in items),
                "tokens": sum(len(item["input_ids"]) for item in items),
            }
            for split, items in rows.items()
        }
        manifest = Manifest(
            format_version=FORMAT_VERSION, num_actions=num_actions, action_dim=A, encoder="hash",
            tokenizer=lm_folder(family), tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            vocabulary=len(tokenizer), has_start_token=family == "llama", splits=counts,
            left_out=0, seed=0, sources=[], settings={}, versions={},
        )  # fmt: skip
        write_manifest(folder, manifest)
        return PreparedCorpus.load(folder)

    return make


@pytest.fixture
def make_run(lm_folder, tmp_path):
    """A run directory whose model's plan is loud: what starts at zero is random."""

    def make(corpus, family="gpt2", name="run", **options):
        model = PlanLMForCausalLM.from_lm(lm_folder(family), corpus.codebook, conditioned_layers=2, **options)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in (model.adapter.weight, model.adapter.bias):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / name / "model")
        return tmp_path / name

    return make
