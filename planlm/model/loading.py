"""Language models and joint models from folders and hub names: what does not fit, or is not finite, is refused."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from planlm.errors import InputError
from planlm.files import read_json, replacing_folder, share
from planlm.model.card import CARD, write_card
from planlm.model.configuration import PlanLMConfig
from planlm.model.families import check_family
from planlm.model.planner import codebook_fingerprint
from planlm.precision import device
from planlm.pretrained.names import absolute, loading, resolve
from planlm.pretrained.tokenizer import load_tokenizer, tokenizer_fingerprint
from planlm.pretrained.weights import check_finite, check_loaded, check_sizes, read_header, stored_tensors
from planlm.text.encoder import SentenceEncoder

if TYPE_CHECKING:
    from planlm.model.modeling import PlanLMForCausalLM

_WHERE = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
"""What says where in a folder or on the hub a model's files are, the tokenizer's as well as the weights'."""

CENTROIDS = "centroids.safetensors"
"""File in a model's folder with the actions that training started from."""

_CODE = "modeling_planlm"
"""Module in a model's folder through which transformers' Auto classes find PlanLM's, where it is not imported yet."""


def lm_config(name: str) -> PreTrainedConfig:
    """The configuration of an LM by hub name or folder, without its weights.

    Raises:
        InputError: it cannot be loaded, or its family is not supported.
    """
    folder = resolve(name, "lm")
    with loading(name, "lm"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=Path(folder).is_dir()
        )
        check_family(config)
    return config


def load_lm(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The LM of a hub name or folder; its family is checked before its weights are read.

    Args:
        name: causal LM by hub name or folder.
        dtype: of all weights.

    Raises:
        InputError: it cannot be loaded, its family is not supported, or its weights do not fit its configuration.
    """
    config, folder = lm_config(name), resolve(name, "lm")
    is_folder = Path(folder).is_dir()
    with loading(name, "lm"):
        _check_generation(folder)
        stored = stored_tensors(folder, local_files_only=is_folder)
        check_sizes(name, config, stored, lambda: AutoModelForCausalLM.from_config(copy.deepcopy(config)))
        lm, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, with the names
            output_loading_info=True,
            local_files_only=is_folder,
        )
    check_loaded(name, info)
    check_finite(name, lm)
    return lm


def model_folder(name: str) -> Path:
    """Where the joint model of a run directory is; of a model folder, the folder itself."""
    folder = Path(name)
    return folder / "model" if (folder / "model").is_dir() else folder


def model_checksum(name: str) -> str:
    """What a run directory's model or a model folder is: sha256 of its weights, tokenizer and settings."""
    folder, digest = model_folder(name), hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def joint_config(name: str) -> PlanLMConfig | None:
    """The configuration of the joint model of a run directory or a model folder; None where `name` is neither.

    Raises:
        InputError: a run whose training has not finished, or a damaged configuration.
    """
    folder = model_folder(name)
    is_run = (Path(name) / "config.yaml").is_file()
    if not (folder / "config.json").is_file():
        if is_run:
            raise InputError(f"{name}: no trained model here yet (model/config.json is missing); finish the run first")
        return None
    with loading(str(folder), "joint"):
        if read_json(folder / "config.json").get("model_type") != PlanLMConfig.model_type:
            return None
        config: PlanLMConfig = PlanLMConfig.from_pretrained(folder, local_files_only=True)
    return config


def load_model(run: str) -> PlanLMForCausalLM:
    """The joint model of a run directory, or of a model folder, in evaluation mode, with its tokenizer.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    folder = model_folder(run)
    if not (folder / "config.json").is_file():
        raise InputError(f"{run}: no trained model here (model/config.json is missing); make one with `planlm train`")
    with loading(str(folder), "joint"):
        model_type = read_json(folder / "config.json").get("model_type")
        if model_type != PlanLMConfig.model_type:
            found = f"a {model_type} model" if model_type else "config.json without a model_type"
            raise InputError(f"{folder}: {found}, not a joint model of PlanLM; make one with `planlm train`")
        _check_generation(str(folder))
        model: PlanLMForCausalLM = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        )
        assert model.tokenizer is not None  # read now: a folder without one is refused before any work
    return model.to(device()).eval()


def save_model(model: PlanLMForCausalLM, folder: Path, weights: dict[str, Tensor] | None = None) -> Path:
    """Write the model's folder, which is whole or absent.

    Args:
        model: the model.
        folder: where to.
        weights: whole ones, where the model's are divided among processes.
    """
    with replacing_folder(folder) as beside:
        if (folder / CARD).is_file():  # with what users have written into it
            shutil.copyfile(folder / CARD, beside / CARD)
        model.save_pretrained(beside, state_dict=weights)
    return folder


def _check_generation(folder: str) -> None:
    """Refuse a damaged generation_config.json: transformers takes it for none, and texts then have no end."""
    path = Path(folder, "generation_config.json")
    settings = read_json(path) if os.path.lexists(path) else {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = settings.get(key)
        if not all(isinstance(it, int) and abs(it) < 1 << 31 for it in (ids if isinstance(ids, list) else [ids or 0])):
            raise InputError(f"{path}: {key} {ids!r}: expected a token's number; mend it")


class ModelFolder(PreTrainedModel):
    """What of the joint model concerns its folder: checked weights, the tokenizer beside them, the encoder's name."""

    config: PlanLMConfig

    _tokenizer: Any = None
    _encoder: SentenceEncoder | None = None
    _centroids: Tensor | None = None
    _loaded_from = ""
    _encoder_name = ""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load the model as transformers does, and its tokenizer; weights that do not fit are refused.

        Args:
            pretrained_model_name_or_path: folder or hub name; None where `state_dict` and `config` are given instead.
            args: transformers'.
            kwargs: transformers'; with `ignore_mismatched_sizes` weights of another shape are drawn anew.

        Raises:
            InputError: tensors are missing, extra, of another shape or not finite, or the tokenizer is another one
                than the model was trained with.
        """
        name = pretrained_model_name_or_path
        if name is None or kwargs.get("gguf_file"):  # weights from elsewhere are the caller's affair
            return super().from_pretrained(name, *args, **kwargs)
        name = str(name)
        wants_info = kwargs.pop("output_loading_info", False)
        draws_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        where = {key: kwargs[key] for key in _WHERE if kwargs.get(key) is not None}
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(name if config is None else config, **where)  # type: ignore[union-attr]
        if not kwargs.get("variant"):
            stored = stored_tensors(name, **where)
            check_sizes(name, config, stored, lambda: cls(copy.deepcopy(config), *args))
            if "codebook" in stored:  # where it lay until 0.1
                if "adapter.codebook" in stored:
                    raise InputError(f"{name}: holds two codebooks (codebook, adapter.codebook); copy the model again")
                kwargs["key_mapping"] = {"^codebook$": "adapter.codebook"} | (kwargs.get("key_mapping") or {})
        kwargs["use_safetensors"] = True
        model, info = super().from_pretrained(
            name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        check_loaded(name, info | {"mismatched_keys": set()} if draws_mismatched else info)
        check_finite(name, model)
        # transformers would save under the old name what it has found there.
        model._weight_conversions = [c for c in model._weight_conversions if "^codebook$" not in c.source_patterns]
        model._find_assets(name, where)
        return (model, info) if wants_info else model

    def _find_assets(self, name: str, where: dict[str, Any]) -> None:
        """Read the tokenizer and settle where the encoder is: later the working directory may be another one."""
        folder = Path(name, where.get("subfolder", "")).absolute() if Path(name).is_dir() else None
        self._loaded_from = str(folder or name)
        self._encoder_name = absolute(self.config.encoder, beside=folder)
        found = cached_file(name, CENTROIDS, _raise_exceptions_for_missing_entries=False, **where)
        if found is not None:
            stored = load_file(found) if "centroids" in read_header(found) else {}
            self.centroids = stored.get("centroids", torch.zeros(0))
            if codebook_fingerprint(self.centroids) != self.config.codebook_fingerprint:
                raise InputError(f"{found}: not the actions that the model was trained on; copy the model again")
        if cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **where) is None:
            return
        self._tokenizer = load_tokenizer(name, **where)
        expected = self.config.tokenizer_fingerprint
        if expected and tokenizer_fingerprint(self._tokenizer) != expected:
            raise InputError(
                f"{self._loaded_from}: its tokenizer is not the one that the model was trained with; put that one's "
                "tokenizer.json and tokenizer_config.json back"
            )

    @property
    def tokenizer(self) -> Any:
        """The LM's tokenizer.

        Raises:
            InputError: the model came without one.
        """
        if self._tokenizer is None:
            raise InputError(
                f"{self._loaded_from or 'the model'}: no tokenizer (no tokenizer.json); copy the LM's tokenizer into "
                "the folder, or set model.tokenizer"
            )
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        """Use another tokenizer object."""
        self._tokenizer = tokenizer

    @property
    def centroids(self) -> Tensor:
        """What the codebook was before training, float32 `[K, A]`: a sentence carries the action of the nearest one.

        Raises:
            InputError: the model came without them.
        """
        if self._centroids is None:
            raise InputError(
                f"{self._loaded_from or 'the model'}: no {CENTROIDS}, which says what sentence carries what action; "
                "train the model again"
            )
        return self._centroids

    @centroids.setter
    def centroids(self, centroids: Tensor) -> None:
        """Keep a copy of these."""
        self._centroids = centroids.detach().float().cpu().clone()

    @property
    def has_centroids(self) -> bool:
        """Whether the model can tell which action a sentence carries."""
        return self._centroids is not None

    @property
    def encoder(self) -> SentenceEncoder:
        """The sentence encoder of `config.encoder`, loaded at first use.

        Raises:
            InputError: it cannot be loaded, or its embeddings are not of the model's dimension.
        """
        if self._encoder is None:
            name = self._encoder_name or self.config.encoder
            encoder = SentenceEncoder(name)
            if encoder.dim != self.config.action_dim:
                raise InputError(
                    f"{name}: embeds in {encoder.dim} dimensions, the model was trained on {self.config.action_dim}; "
                    "set `encoder` in its config.json to the encoder of its corpus"
                )
            self._encoder = encoder
        return self._encoder

    @encoder.setter
    def encoder(self, encoder: SentenceEncoder) -> None:
        """Use another encoder object."""
        self._encoder = encoder

    @property
    def has_encoder(self) -> bool:
        """Whether the model can embed sentences; without, it plans every text as one sentence."""
        return bool(self._encoder or self.config.encoder)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with tokenizer, model card, and what lets transformers find the model's classes.

        Of a card that is there already only PlanLM's own part is written anew.
        """
        if self._tokenizer is not None:
            self.config.tokenizer_fingerprint = tokenizer_fingerprint(self._tokenizer)
        name = type(self).__name__.removeprefix("FSDP")  # what dividing the weights calls the class
        self.config.auto_map = {
            "AutoConfig": f"{_CODE}.{PlanLMConfig.__name__}",
            "AutoModelForCausalLM": f"{_CODE}.{name}",
        }
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            centroids = Path(save_directory, CENTROIDS)
            centroids.unlink(missing_ok=True)  # of a model that was there before
            if self._centroids is not None:
                save_file({"centroids": self._centroids}, centroids)
        share(Path(save_directory).glob("*.safetensors"))
        if kwargs.get("is_main_process", True):
            code = f"from planlm.model import {PlanLMConfig.__name__}, {name}\n"
            Path(save_directory, f"{_CODE}.py").write_text(code, encoding="utf-8")
            write_card(Path(save_directory), self.config)
            if self._tokenizer is not None:
                self._tokenizer.save_pretrained(save_directory)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Leave the class as it is: else transformers would copy PlanLM's sources into the folders it saves."""
