"""What `planlm train` begins with: an LM to condition, or the joint model of an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from planlm.config import TrainConfig
from planlm.corpus.labels import read_labels
from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError
from planlm.model.configuration import PLANNER_SHAPE, PlanLMConfig
from planlm.model.families import set_dropout
from planlm.model.loading import joint_config, lm_config, load_model, model_folder
from planlm.model.lora import add_lora
from planlm.model.loss import usable_loss
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.planner import Planner, codebook_fingerprint
from planlm.precision import device
from planlm.pretrained.names import absolute
from planlm.pretrained.tokenizer import load_tokenizer, tokenizer_fingerprint
from planlm.text.encoder import encoder_fingerprint

BUILT = ("conditioning", "gate", "codebook_per_layer", "planner_input", "attention_window")
"""Settings that a joint model was built with and keeps."""

BUILT_OR_DEFAULT = ("conditioned_layers", "planner_lm_layers")
"""Such of which None means the model's own."""


def check_fit(config: TrainConfig, corpus: PreparedCorpus, lm: str) -> None:
    """Refuse settings that the corpus, the LM or the joint model has no room for, before any weights are read.

    Args:
        config: the command's configuration.
        corpus: of `--corpus`.
        lm: LM by hub name or folder, or run directory or folder of a joint model.

    Raises:
        InputError: names what does not fit.
    """
    joint = joint_config(lm)
    if tokenizer_fingerprint(load_tokenizer(lm if joint is None else str(model_folder(lm)))) != (
        corpus.manifest.tokenizer_fingerprint
    ):
        raise InputError(
            f"{config.corpus}: prepared with the tokenizer of {corpus.manifest.tokenizer}, which is not that of {lm}; "
            f"prepare a corpus with --tokenizer {lm if joint is None else model_folder(lm)}"
        )
    if config.top_k is not None and config.top_k > corpus.manifest.num_actions:
        raise InputError(
            f"--top-k {config.top_k}: {config.corpus} has {corpus.manifest.num_actions} actions; set fewer"
        )
    context = (lm_config(lm) if joint is None else joint.get_text_config()).max_position_embeddings
    if config.window > context:
        raise InputError(f"--window {config.window}: the context of {lm} is {context} tokens; set at most that")
    if joint is not None:
        _check_joint(config, corpus, joint, lm)


def _check_joint(config: TrainConfig, corpus: PreparedCorpus, joint: PlanLMConfig, lm: str) -> None:
    """Refuse a joint model of other actions than the corpus has, or of another build than is asked for."""
    about = corpus.manifest
    advice = "give the corpus that it was trained on, or one that was prepared with --codebook set to that"
    if joint.num_actions != about.num_actions:
        raise InputError(f"--lm {lm}: has {joint.num_actions} actions, {config.corpus} {about.num_actions}; {advice}")
    encoder = absolute(joint.encoder, beside=model_folder(lm))
    is_known = encoder and (not encoder.startswith("/") or Path(encoder).is_dir())
    if is_known and encoder_fingerprint(encoder) != about.settings.get("encoder_fingerprint"):
        raise InputError(
            f"--lm {lm}: its sentence encoder is {encoder}, {config.corpus} has another, {about.encoder}; {advice}"
        )
    if joint.codebook_fingerprint != codebook_fingerprint(corpus.codebook):
        raise InputError(f"--lm {lm}: trained on other actions than those of {config.corpus}; {advice}")
    if config.planner is not None and joint.conditioning == "bottleneck":
        raise InputError(f"--planner: {lm} has no planner (conditioning bottleneck); leave it out")
    wrong = [name for name in BUILT if getattr(config, name) != getattr(joint, name)]
    wrong += [name for name in BUILT_OR_DEFAULT if getattr(config, name) not in (None, getattr(joint, name))]
    if wrong:
        built = ", ".join(_flag(name, getattr(joint, name)) for name in wrong)
        raise InputError(f"--lm {lm}: the joint model was built with {built}, and stays so; set the same")


def _flag(name: str, value: Any) -> str:
    """A setting as it is given on the command line."""
    option = name.replace("_", "-")
    if value is None or value is False:
        return f"no --{option}"
    return f"--{option}" if value is True else f"--{option} {value}"


def starting_model(config: TrainConfig, corpus: PreparedCorpus, lm: str, planner: Planner | None) -> PlanLMForCausalLM:
    """The joint model on the device, ready to train; see `check_fit`.

    Args:
        config, corpus, lm: as of `check_fit`, which has passed.
        planner: of `--planner`; None: a joint model's own, or an untrained one.

    Raises:
        InputError: weights that cannot be loaded, or a planner of other actions.
    """
    loss_kernel = usable_loss(config.loss_kernel, device())
    torch.manual_seed(config.seed)
    model = (
        _conditioned(config, corpus, lm, planner) if joint_config(lm) is None else _joint(config, corpus, lm, planner)
    )
    model.to(device())
    model.loss_kernel = loss_kernel
    set_dropout(model.lm, config.lm_dropout)
    if config.checkpoint_activations:
        model.lm.activation_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        model.compile_lm()
    return model


def _conditioned(config: TrainConfig, corpus: PreparedCorpus, lm: str, planner: Planner | None) -> PlanLMForCausalLM:
    """An LM with a new adapter."""
    return PlanLMForCausalLM.from_lm(
        lm,
        corpus.codebook,
        planner=planner,
        encoder=corpus.manifest.encoder,
        action_labels=read_labels(corpus.path, corpus.manifest.num_actions),
        lora=(config.lora_rank, config.lora_alpha) if config.lm_mode == "lora" else None,
        **{name: getattr(config, name) for name in (*BUILT, *BUILT_OR_DEFAULT)},
        **_planned(config),
    )


def _joint(config: TrainConfig, corpus: PreparedCorpus, lm: str, planner: Planner | None) -> PlanLMForCausalLM:
    """An earlier run's model; plans are made as this run says."""
    model = load_model(lm)
    if config.lm_mode == "lora":
        add_lora(model.lm, config.lora_rank, config.lora_alpha)
    if planner is not None:
        if planner.settings["codebook_fingerprint"] != model.config.codebook_fingerprint:
            raise InputError(
                f"--planner {config.planner}: trained on other actions than {lm}; pre-train one on {config.corpus}"
            )
        model.planner = planner
        for name in PLANNER_SHAPE:
            setattr(model.config, f"planner_{name}", planner.settings[name])
    for name, value in _planned(config).items():
        setattr(model.config, name, value)
    model.config.encoder = absolute(corpus.manifest.encoder)
    model.centroids = corpus.codebook  # which earlier versions did not save
    if model.config.action_labels is None:
        model.config.action_labels = read_labels(corpus.path, corpus.manifest.num_actions)
    return model


def _planned(config: TrainConfig) -> dict[str, Any]:
    """How plans are made, as fields of `PlanLMConfig`."""
    return {
        "selection": config.selection,
        "plan_temperature": config.temperature,
        "plan_top_k": config.top_k,
        "gumbel_scale": config.gumbel_scale,
    }
