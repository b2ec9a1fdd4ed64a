"""What training has cost the LM: its NLL with the plan off, beside that of the LM that training began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from planlm.config import EvaluateConfig
from planlm.corpus.store import SPLITS, PreparedCorpus
from planlm.errors import InputError
from planlm.evaluation.perplexity import score_documents
from planlm.evaluation.significance import DocumentScores, paired_bootstrap
from planlm.flat_yaml import read_flat
from planlm.model.loading import joint_config, load_model
from planlm.model.modeling import PlanLMForCausalLM
from planlm.precision import device
from planlm.pretrained.tokenizer import tokenizer_fingerprint


class Forgetting:
    """Measures an LM and its base on a text of another kind and on the split that is evaluated.

    Args:
        config: the command's configuration, `--forgetting` among it.
        corpus: the one that the LM was trained on.
        model: the trained model.

    Raises:
        InputError: the other corpus cannot be read, is of another tokenizer or has no such split, or nothing says what
            the base LM is.
    """

    def __init__(self, config: EvaluateConfig, corpus: PreparedCorpus, model: PlanLMForCausalLM) -> None:
        assert config.forgetting is not None
        self._config, self._corpus, self._model = config, corpus, model
        self._other = PreparedCorpus.load(config.forgetting)
        if self._other.manifest.tokenizer_fingerprint != tokenizer_fingerprint(model.tokenizer):
            raise InputError(
                f"--forgetting {config.forgetting}: prepared with the tokenizer of {self._other.manifest.tokenizer}, "
                f"which is not that of {config.run}; prepare it again with --tokenizer set to the run's model folder"
            )
        self._split, self._documents = _documents(self._other, config)
        self._base = _base_lm(config, corpus)

    def measure(
        self, dataset: datasets.Dataset, window: int, stride: int, after: DocumentScores | None
    ) -> dict[str, Any]:
        """Score both LMs with the plan off; under torchrun the processes share the windows.

        Args:
            dataset: the documents that are evaluated, of the corpus trained on.
            window, stride: as elsewhere in the evaluation.
            after: scores of the trained LM on `dataset` with the plan off, where they are known.

        Returns:
            `corpus`, `split`, `base_lm`; `before`, `after` (nats per token), `delta`, `ci95` (None below six
            documents), `documents`, `tokens`; and `trained_on`, the same figures on `dataset`.

        Raises:
            InputError: the base LM cannot be loaded, or is of another tokenizer.
        """
        if joint_config(self._base) is None:
            window_of_lm = self._model.config.attention_window
            base = PlanLMForCausalLM.from_lm(self._base, self._corpus.codebook, attention_window=window_of_lm)
        else:  # an earlier run's, that this one went on from
            base = load_model(self._base)
        base = base.to(device())
        if tokenizer_fingerprint(base.tokenizer) != tokenizer_fingerprint(self._model.tokenizer):
            raise InputError(
                f"--base-lm {self._base}: its tokenizer is not that of {self._config.run}; give the LM it was"
            )
        found = []
        for documents, known in ((self._documents, None), (dataset, after)):
            before = self._score(base, documents, window, stride)
            found.append(self._compare(before, known or self._score(self._model, documents, window, stride)))
        about = {"corpus": str(self._other.path), "split": self._split, "base_lm": self._base}
        return {**about, **found[0], "trained_on": found[1]}

    def _score(self, model: PlanLMForCausalLM, documents: datasets.Dataset, window: int, stride: int) -> DocumentScores:
        batch_size, precision = self._config.batch_size, self._config.precision
        return score_documents(
            model,
            documents,
            selections=["none"],
            window=window,
            stride=stride,
            batch_size=batch_size,
            precision=precision,
        )["none"]

    def _compare(self, before: DocumentScores, after: DocumentScores) -> dict[str, Any]:
        if before.tokens.sum() == 0:
            raise InputError(f"--forgetting {self._config.forgetting}: no document has a token to score")
        delta, interval = paired_bootstrap(after, before, resamples=self._config.bootstrap, seed=self._config.seed)
        return {
            "before": before.nll,
            "after": after.nll,
            "delta": delta,
            "ci95": None if interval is None else list(interval),
            "documents": int((after.tokens > 0).sum()),
            "tokens": int(after.tokens.sum()),
        }


def _documents(corpus: PreparedCorpus, config: EvaluateConfig) -> tuple[str, datasets.Dataset]:
    """The split of `--forgetting-split`, or else of `--split`, or all documents where there is none of that name."""
    present = [name for name in SPLITS if corpus.manifest.splits.get(name, {}).get("documents")]
    split = config.forgetting_split or (config.split if config.split in present else "all")
    chosen = corpus.split(split) if split != "all" else datasets.concatenate_datasets(list(map(corpus.split, present)))
    return split, chosen


def _base_lm(config: EvaluateConfig, corpus: PreparedCorpus) -> str:
    """The LM that training began with: `--base-lm`, or what the run's settings say."""
    if config.base_lm is not None:
        return config.base_lm
    settings = Path(config.run) / "config.yaml"
    if not settings.is_file():
        raise InputError(
            f"--forgetting: {config.run} has no config.yaml that names the LM it was; give it with --base-lm"
        )
    return str(read_flat(settings).get("lm") or corpus.manifest.tokenizer)
