"""Harm done to a folder of weights, for tests of what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]


def change(folder: Path, changed: Callable[[Weights], Weights], file: str = "model.safetensors") -> None:
    weights = load_file(folder / file)
    save_file(changed(weights), folder / file, metadata={"format": "pt"})


def configure(folder: Path, file: str = "config.json", **values: object) -> None:
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
