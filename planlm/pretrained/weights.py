"""Whether the weights of a model folder are the ones that its config.json describes.

transformers only warns of weights that do not fit: it draws random ones for those that are missing and drops the rest.
Whoever trains or generates with such a model notices late, or never.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers  # whose Auto classes, once imported, import the model, and that this module
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, modeling_utils
from transformers.utils import cached_file

from planlm.errors import InputError

Stored = Mapping[str, tuple[str, tuple[int, ...]]]
"""safetensors' dtype name and the shape of each stored tensor, by key."""

_CONSTANT = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|(^|\.)position_ids$")
"""Constants that older versions of transformers stored with the weights and newer ones compute."""

_FLOATS = ("F64", "F32", "F16", "BF16")
_SEVERAL_TIMES = 4
"""Room for what a wrong value adds: up to here the tensors themselves are compared, and the message names them."""

_LAYERS = ("num_hidden_layers", "num_decoder_layers")
_SHOWN = 3
_CONVERT = (
    "and PlanLM never unpickles; convert them to safetensors: load the model where you trust it and save it again"
)
_INDEX = "model.safetensors.index.json"
_ONE_AT_A_TIME = threading.Lock()  # two threads' patches, taken back in another order, would leave one behind


def stored_tensors(name: str, **hub: Any) -> Stored:
    """What the safetensors files of a model hold, read from their headers.

    Args:
        name: folder or hub name.
        hub: where in it and how to get it: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`.

    Raises:
        InputError: there are no safetensors files, one that the index names is missing, or one is damaged.
    """

    def find(file: str) -> str | None:
        found: str | None = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)
        return found

    if find("adapter_config.json") is not None:
        raise InputError(
            f"{name}: holds a peft adapter (adapter_config.json); merge it into its model (merge_and_unload) and save "
            "that"
        )
    files = ["model.safetensors"]
    if find(files[0]) is None:
        if (index := find(_INDEX)) is None:
            pickled = [file for file in ("pytorch_model.bin", "pytorch_model.bin.index.json") if find(file)]
            if pickled:
                raise InputError(f"{name}: its weights are pickled ({pickled[0]}), {_CONVERT}")
            raise InputError(f"{name}: no weights here (no model.safetensors); give the folder of a saved model")
        files = _indexed(Path(index))
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        if (path := find(file)) is None:
            raise InputError(f"{name}: {file} named in {_INDEX} is missing; copy or save the model again")
        header = read_header(path)
        if twice := sorted(stored.keys() & header.keys()):
            raise InputError(f"{name}: {_several(twice)} in two files of weights; copy or save the model again")
        stored |= header
    return stored


def read_header(path: str | Path) -> Stored:
    """What one safetensors file holds.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            views = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  not a mapping
            return {key: (view.get_dtype(), tuple(view.get_shape())) for key, view in views.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged ({error}); copy or save the model again") from None


def _indexed(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [file for file in files if Path(file).is_absolute() or ".." in Path(file).parts]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{index}: not an index of weights; copy or save the model again") from None
    if outside:
        raise InputError(f"{index}: names {outside[0]}, which is not in its folder; copy or save the model again")
    return files


def check_sizes(name: str, config: PreTrainedConfig, stored: Stored, build: Callable[[], nn.Module]) -> None:
    """Refuse a configuration of which nothing like it is stored, before any memory is taken for it.

    Quantised weights are packed in ways of their own and are left to transformers. `build` makes the model, where
    tensors take no memory.

    Raises:
        InputError: it describes more layers than there are tensors, or several times the parameters that are stored;
            or whole numbers are stored in place of weights, or two tensors for one, of which transformers takes either.
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    text = config.get_text_config()
    layers = sum(int(getattr(text, key, 0) or 0) for key in _LAYERS) + getattr(config, "planner_layers", 0)
    if layers > len(stored):
        raise InputError(f"{name}: config.json says {layers:,} layers, and {len(stored)} tensors are stored; mend it")
    with torch.device("meta"):
        model = build()
    parameters = dict(model.named_parameters())
    check_packed(name, stored, parameters)
    if twice := [key for key in stored if f"{getattr(model, 'base_model_prefix', '')}.{key}" in stored]:
        raise InputError(
            f"{name}: weights stored under two names, with and without a prefix ({_several(twice)}); "
            "copy or save the model again"
        )
    wanted = sum(tensor.numel() for tensor in parameters.values())
    have = sum(math.prod(shape) for _, shape in stored.values())
    if wanted > _SEVERAL_TIMES * have:
        raise InputError(
            f"{name}: config.json describes {wanted:,} parameters, and the weights hold {have:,}: the two are not of "
            "the same model; copy or save it again"
        )


def check_packed(name: str, stored: Stored, parameters: Collection[str] = ()) -> None:
    """Refuse weights stored as whole numbers or 8-bit floats, which would be read as if they were the weights.

    They are known by the usual ends of their names, and as `parameters` of the model.
    """
    packed = [
        f"{key} {dtype}"
        for key, (dtype, _) in stored.items()
        if dtype not in _FLOATS
        and (key.endswith((".weight", ".bias")) or key in parameters)
        and not _CONSTANT.search(key)
    ]
    if packed:
        raise InputError(
            f"{name}: quantised weights, and no quantization_config in config.json ({_several(packed)}); give the "
            "model in bf16 or float32"
        )


def check_loaded(name: str, info: Mapping[str, Any]) -> None:
    """Refuse weights of which transformers' `output_loading_info` says some missing, extra or of another shape.

    Raises:
        InputError: names the first few keys, and a prefix that explains them all if there is one.
    """
    missing = sorted(info["missing_keys"])
    unexpected = sorted(info["unexpected_keys"])
    surplus = [key for key in unexpected if not _CONSTANT.search(key)]
    mismatched = [f"{key} {tuple(have)} for {tuple(want)}" for key, have, want in sorted(info["mismatched_keys"])]
    found = {"missing": missing, "not of this model": surplus, "of another shape": mismatched}
    problems = [f"{len(keys)} {what} ({_several(keys)})" for what, keys in found.items() if keys]
    problems += [str(message).splitlines()[0] for message in info["error_msgs"] if str(message)]
    if problems:
        prefix = _prefix(missing, unexpected)
        advice = (
            f"the keys carry the prefix {prefix!r}: save the inner model, without its wrapper"
            if prefix
            else "save the whole model again with the config.json that belongs to it"
        )
        raise InputError(f"{name}: the weights do not fit config.json: {', '.join(problems)}; {advice}")


def _prefix(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What a wrapper (DDP, torch.compile, peft) has put before keys that would fit without; "" where it is not that.

    Most will do: tied weights are missing under one name only.
    """
    prefixes = {key.removesuffix(missing[-1]) for key in unexpected if missing and key.endswith(f".{missing[-1]}")}
    return next((it for it in prefixes if 2 * len({it + key for key in missing} & set(unexpected)) > len(missing)), "")


def check_finite(name: str, model: nn.Module) -> None:
    """Refuse weights that hold NaN or infinity; tensors without data here (offloaded, `meta`) are left out.

    Raises:
        InputError: names the first few.
    """
    bad = [
        key
        for key, tensor in model.state_dict().items()
        if tensor.is_floating_point()
        and not tensor.is_meta
        # NaN and infinity survive a sum, which needs no memory; one that overflows is looked at again.
        and not tensor.sum(dtype=torch.float32).isfinite()
        and not tensor.isfinite().all()
    ]
    if bad:
        raise InputError(
            f"{name}: weights that are not finite numbers ({_several(bad)}): the training that made them diverged, or "
            "the file is damaged; use another checkpoint"
        )


@contextlib.contextmanager
def checked_encoder(name: str, folder: Path | None) -> Iterator[None]:
    """Refuse pickled, damaged and unfit weights of the encoder that is loaded within this context.

    sentence-transformers does not hand on what transformers finds, so that is looked at where transformers reports it.
    An encoder takes the body of a model: heads beside it, as pre-training leaves them, are not missed.

    Args:
        name: of the encoder, for the message.
        folder: its folder, if it has one; each module of sentence-transformers may have one of its own in it.
    """
    for found in sorted(folder.rglob("config.json")) if folder else ():
        if '"model_type"' not in found.read_text(encoding="utf-8"):  # pooling, a dense layer and the like
            if (weights := found.with_name("model.safetensors")).is_file():
                check_packed(name, read_header(weights))
            continue
        config = transformers.AutoConfig.from_pretrained(found.parent, trust_remote_code=False, local_files_only=True)
        stored = stored_tensors(str(found.parent), local_files_only=True)
        check_sizes(name, config, stored, functools.partial(transformers.AutoModel.from_config, config))
    settings = folder.rglob("sentence_*_config.json") if folder else ()
    needs_pooler = any("pooler_output" in found.read_text(encoding="utf-8") for found in settings)

    def check(model: Any, *_: Any, loading_info: Any, **__: Any) -> None:
        info = dict(loading_info.to_dict())
        # A model's own pooler makes few embeddings: most often pooling does, and many models are stored without one.
        missing = {key for key in info["missing_keys"] if needs_pooler or key.split(".", 1)[0] != "pooler"}
        if not missing:
            body, prefix = dict(model.named_children()), f"{model.base_model_prefix}."
            own = {key for key in info["unexpected_keys"] if key.removeprefix(prefix).split(".", 1)[0] in body}
            info["unexpected_keys"] = own
        check_loaded(name, info | {"missing_keys": missing})

    def refuse(file: Any, *_: Any, **__: Any) -> None:
        raise InputError(f"{name}: its weights are pickled ({file}), {_CONVERT}")

    with (
        _ONE_AT_A_TIME,
        mock.patch.object(modeling_utils, "log_state_dict_report", check),
        mock.patch.object(torch, "load", refuse),
    ):
        yield


def _several(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
