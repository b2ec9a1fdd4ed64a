"""A run directory's checkpoints: written beside and renamed, checksummed, safetensors and JSON only.

`checkpoints/step-N/` holds `tensors.safetensors` (trainable parameters, optimiser moments, random state) and
`state.json` (step, position in the data); `checksums.json` is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FORMAT_VERSION = 1


def save_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-N`, N being the "step" of `state`, then delete all but the newest `keep` checkpoints."""
    final = folder / f"step-{state['step']}"
    beside = final.with_name(final.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, beside / "tensors.safetensors")
    (beside / "state.json").write_text(json.dumps({"format_version": FORMAT_VERSION, **state}, indent=1))
    sums = {path.name: _digest(path) for path in sorted(beside.iterdir())}
    (beside / "checksums.json").write_text(json.dumps(sums, indent=1))
    for path in beside.iterdir():
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    _flush(folder)
    for old in _newest_first(folder)[max(1, keep) :]:
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path, log: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest checkpoint whose checksums hold, or None.

    A damaged one is set aside as `step-N.damaged`, which `log` is told.
    """
    for path in _newest_first(folder):
        try:
            sums = json.loads((path / "checksums.json").read_text())
            sound = bool(sums) and all(_digest(path / name) == digest for name, digest in sums.items())
        except (OSError, ValueError):
            sound = False
        if sound:
            return load_file(path / "tensors.safetensors"), json.loads((path / "state.json").read_text())
        aside = path.with_name(path.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        log(f"{path}: damaged, set aside as {aside.name}")
    return None


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
