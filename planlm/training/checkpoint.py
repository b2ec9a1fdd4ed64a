"""A run directory's checkpoints: written beside and renamed, checksummed, safetensors and JSON only.

`checkpoints/step-N/` holds `tensors.safetensors`, or a file of each rank (trainable parameters, optimiser moments),
and `state.json` (step, position in the data); `checksums.json` is written last. All are read through
torch.distributed.checkpoint, which reads what any number of ranks wrote on any other number of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from planlm.distribution import all_reduce_sum, broadcast_text, on_rank_zero, world_size
from planlm.errors import InputError, MachineError
from planlm.files import replacing_folder

FORMAT_VERSION = 2

_DAMAGE = (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError)
"""What reading a damaged checkpoint raises; valid JSON need be no object."""


def save_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any], keep: int) -> None:
    """Write `folder/step-N`, N being the "step" of `state`, then delete all but the newest `keep` checkpoints.

    What these name as the best step of their "validation" stays as well: whichever is taken up, its best is there.
    Several ranks write one file each, with their shards and some of the tensors that all of them have.
    """
    made = contextlib.ExitStack()

    def begin() -> str:
        return str(made.enter_context(replacing_folder(folder / f"step-{state['step']}")))

    def finish() -> None:
        (beside / "state.json").write_text(json.dumps({"format_version": FORMAT_VERSION, **state}, indent=1))
        sums = {path.name: _digest(path) for path in sorted(beside.iterdir())}
        (beside / "checksums.json").write_text(json.dumps(sums, indent=1))
        made.close()
        found = _newest_first(folder)
        best = {_best_step(path) for path in found[: max(1, keep)]}
        for old in found[max(1, keep) :]:
            if old.name not in best:
                shutil.rmtree(old)

    with made:
        beside = Path(broadcast_text(on_rank_zero(begin)))
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        if world_size() == 1:  # the writer below makes the whole file in memory
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside / "tensors.safetensors")
        else:
            with _errors_of_the_system():
                save(tensors, storage_writer=HuggingFaceStorageWriter(str(beside), save_distributed=True))
        on_rank_zero(finish)


@contextlib.contextmanager
def _errors_of_the_system() -> Iterator[None]:
    """torch puts every rank's error into one that is no `Exception`: the first of them is raised in its place."""
    try:
        yield
    except CheckpointException as failed:
        raise next(iter(failed.failures.values()))[0] from None


def check_room(folder: Path, size: int) -> None:
    """Refuse to begin what cannot be stored once.

    Raises:
        MachineError: the disk of `folder` has fewer than `size` bytes free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise MachineError(
            f"{folder}: no space left on the disk for a checkpoint: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} free"
        )


def newest_checkpoint(folder: Path, log: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose checksums hold, with its state, or None where none was ever finished.

    A damaged one is set aside as `step-N.damaged`, which `log` is told.

    Raises:
        MachineError: all that there were are damaged.
        InputError: the newest is of another format.
    """
    found = on_rank_zero(lambda: _newest_sound(folder, log))
    number = int(all_reduce_sum(found or 0)[0])  # the others add nothing
    if number == 0:
        return None
    path = folder / f"step-{number}"
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    if state.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: of another PlanLM, format {state.get('format_version')}, this one reads {FORMAT_VERSION}"
        )
    return path, state


def planned_steps(folder: Path) -> int:
    """Steps of the run that the checkpoints in `folder` belong to, as far as they say; 0 without one."""
    planned = [0]
    for path in _newest_first(folder):
        with contextlib.suppress(*_DAMAGE):
            planned.append(int(json.loads((path / "state.json").read_text())["steps"]))
    return max(planned)


def _newest_sound(folder: Path, log: Callable[[str], None]) -> int | None:
    """Its number of steps."""
    for path in _newest_first(folder):
        try:
            is_sound = _is_sound(path)
        except _DAMAGE:
            is_sound = False
        if is_sound:
            return int(path.name[5:])
        aside = path.with_name(path.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        log(f"{path}: damaged, set aside as {aside.name}")
    damaged = sorted(path.name for path in folder.glob("step-*.damaged"))
    if damaged:  # beginning anew by itself would overwrite the log of what is lost
        raise MachineError(
            f"{folder}: no sound checkpoint is left ({', '.join(damaged)}); choose another --out, or delete this "
            "folder to begin the run anew"
        )
    return None


def _is_sound(path: Path) -> bool:
    """Whether a checkpoint is what was written; what else lies in its folder is nobody's concern."""
    sums = _sums(path)
    if "state.json" not in sums or any(_digest(path / name) != digest for name, digest in sums.items()):
        return False
    state = json.loads((path / "state.json").read_text())
    return bool(state["step"] == int(path.name[5:]))


def check_sound(path: Path) -> None:
    """Raises MachineError where the checkpoint `path`, which there has to be, is damaged or gone."""
    try:
        is_sound = _is_sound(path)
    except _DAMAGE:
        is_sound = False
    if not is_sound:
        raise MachineError(f"{path}: the best checkpoint is damaged or gone; put a copy there, or choose another --out")


def _best_step(path: Path) -> str:
    """Name of the best checkpoint, as this one has it."""
    try:
        return f"step-{json.loads((path / 'state.json').read_text())['validation']['best_step']}"
    except _DAMAGE:  # or none
        return ""


def _sums(path: Path) -> dict[str, str]:
    """Digests of a checkpoint's files by name, from `checksums.json`. Raises ValueError where that is no such list."""
    sums: dict[str, str] = json.loads((path / "checksums.json").read_text())
    if not all(Path(name).name == name for name in sums):
        raise ValueError(f"{path}: names files elsewhere")
    return sums


def stored_shapes(path: Path) -> dict[str, torch.Size]:
    """Names of a checkpoint's tensors, and their full shapes."""
    stored: dict[str, Any] = _reader(path).read_metadata().state_dict_metadata
    return {name: about.size for name, about in stored.items()}


def read_tensors(path: Path, into: dict[str, torch.Tensor]) -> None:
    """Fill tensors, sharded or not, with those of a checkpoint, however many ranks wrote it."""
    with torch.no_grad(), warnings.catch_warnings(), _errors_of_the_system():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs none
        load(into, storage_reader=_reader(path))


def _reader(path: Path) -> HuggingFaceStorageReader:
    """Of the files in `checksums.json`; by itself the reader takes every `.safetensors` in the folder."""
    reader = HuggingFaceStorageReader(str(path))
    reader.fs.ls = lambda _: [str(path / name) for name in _sums(path)]  # type: ignore[method-assign,assignment]
    return reader


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch("step-[1-9][0-9]{0,17}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
