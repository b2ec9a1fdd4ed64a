"""What a run is about, by content: a corpus, an LM or a planner may move, and another may take over its path."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from planlm.corpus.store import PreparedCorpus
from planlm.distribution import rank

_NAMES_ONLY = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""What an LM's configuration says of its file, and not of what it computes."""


def identify(
    corpus: PreparedCorpus,
    lm: PreTrainedModel | None = None,
    planner: nn.Module | None = None,
    rehearsal: PreparedCorpus | None = None,
    mix: Sequence[tuple[PreparedCorpus, float]] = (),
) -> dict[str, str]:
    """Fingerprints of what a run begins with, by the name of the setting that gives it.

    Weights are hashed in memory (sha256, 1.2 GB/s and thread): their file's layout, type and name do not count.

    Args:
        corpus: the prepared corpus.
        lm: the LM as loaded, or the joint model where a run begins with one.
        planner: the planner as loaded; None where the run makes its own.
        rehearsal: the corpus of `--rehearsal`.
        mix: the corpora of `--mix`, and their shares.
    """
    found = {"corpus": corpus.fingerprint, "encoder": str(corpus.manifest.settings.get("encoder_fingerprint"))}
    if lm is not None:
        settings = {
            name: value for name, value in lm.config.get_text_config().to_diff_dict().items() if name not in _NAMES_ONLY
        }
        weights = {name: value for name, value in lm.state_dict().items() if ".lora_" not in name}
        found["lm"] = _digest(weights, json.dumps(settings, sort_keys=True, default=str))
        found["planner"] = "untrained" if planner is None else _digest(planner.state_dict())
    if rehearsal is not None:
        found["rehearsal"] = rehearsal.fingerprint
    if mix:
        found["mix"] = ", ".join(f"{share!r} of {other.fingerprint}" for other, share in mix)
    return found


def check_encoder(corpus: PreparedCorpus) -> None:
    """Say at once that a corpus' encoder is not where it was: training does without, the trained model does not."""
    encoder = Path(corpus.manifest.encoder)
    if encoder.is_absolute() and not encoder.is_dir() and rank() == 0:
        print(f"{encoder}: the corpus' sentence encoder is not there; `planlm generate` will need it", file=sys.stderr)


def _digest(tensors: dict[str, Tensor], beside: str = "") -> str:
    """sha256 of tensors with their names, types and shapes, and of a text `beside`."""

    def of_one(tensor: Tensor) -> str:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content.numpy().data).hexdigest()}"

    with ThreadPoolExecutor() as pool:  # tied weights have two names in a state dict, and are hashed twice
        found = dict(zip(tensors, pool.map(of_one, tensors.values()), strict=True))
    return hashlib.sha256(json.dumps([found, beside], sort_keys=True).encode()).hexdigest()
