"""One dataclass per command: its fields are the configuration file's keys and the command line's flags.

Standard library only, and imported by every room: `planlm --help` must answer without importing torch, and library
functions take the same objects that the command line builds. `help` texts give units and say where a default comes
from (the papers of docs/method.md, or a measurement in dev/log.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from planlm.errors import InputError
from planlm.selections import SELECTIONS
from planlm.settings import (
    BATCH,
    BELOW_ONE,
    COUNT,
    EPOCHS,
    FRACTION,
    FRACTION_NOT_ZERO,
    NOT_NEGATIVE,
    NUMBER,
    POSITIVE,
    SAMPLING,
    SEED,
    TEMPERATURE,
    TOKENS,
    Limit,
    as_kind,
    count,
    kind_of,
    shown,
)

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_LM = "HuggingFaceTB/SmolLM2-135M-Instruct"

CONDITIONINGS = ("adapter", "embedding", "insert", "bottleneck")
"""How a plan can enter the LM, see docs/method.md; `bottleneck` is the control that has none."""

PLANNER_INPUTS = ("embeddings", "lm", "both")
"""What the planner can read of a sentence, see docs/method.md."""


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None, limit: Limit | None = None) -> Any:
    """A dataclass field that is also a flag: `help` is shown by `--help`, with the default behind it."""
    return field(default=default, metadata={"help": help, "choices": choices, "limit": limit, "positional": False})


def required(help: str, *, positional: bool = False) -> Any:
    """A field without a default: the command line asks for it."""
    return field(metadata={"help": help, "choices": None, "limit": None, "positional": positional})


@dataclass(frozen=True, kw_only=True)
class CommandConfig:
    """What every command takes. Values become the fields' types, whoever gives them: see `as_kind`.

    Raises:
        InputError: values that cannot be, all of them in one line.
    """

    json: bool = option(False, "print the result on stdout as one JSON object")

    def __post_init__(self) -> None:
        problems = []
        for setting in fields(self):
            value, choices, limit = getattr(self, setting.name), setting.metadata["choices"], setting.metadata["limit"]
            flag = setting.name if setting.metadata["positional"] else "--" + setting.name.replace("_", "-")
            if value is None and "None" in str(setting.type):
                continue
            try:
                value = as_kind(kind_of(type(self), setting.name), value)
            except ValueError as error:
                problems.append(f"{flag}: {error}")
                continue
            object.__setattr__(self, setting.name, value)
            if choices and value not in choices:
                problems.append(f"{flag} {value}: expected one of {', '.join(choices)}")
            elif isinstance(value, float) and not math.isfinite(value):
                problems.append(f"{flag} {value}: expected a finite number")
            elif limit and (expected := limit.expected(value)):
                problems.append(f"{flag} {shown(value)}: expected {expected}")
        if problems:
            raise InputError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(CommandConfig):
    """Raw text to a prepared corpus: sentences, embeddings, codebook, actions, tokens."""

    inputs: tuple[str, ...] = required(
        ".txt, .json, .jsonl, .ndjson, WikiText's .raw (also .gz, .bz2, .xz, .zst) or .parquet files, folders of "
        "them, or hf:name[:config][@split]",
        positional=True,
    )
    out: str = required("folder to write the prepared corpus to")
    text_field: str = option("text", "field or column that holds a document's text")
    id_field: str = option("id", "field or column that holds a document's id; where absent, file name and row are used")
    actions: int | None = option(
        None,
        "number of actions K; default: the papers' 1024, or as many as the training sentences allow at 39 each",
        limit=count(10_000_000),
    )
    encoder: str = option(DEFAULT_ENCODER, "sentence-transformers model, by hub name or folder")
    tokenizer: str = option(DEFAULT_LM, "tokenizer of the LM to be trained, by hub name or folder")
    validation_fraction: float = option(0.05, "fraction of documents in the validation split", limit=BELOW_ONE)
    test_fraction: float = option(0.05, "fraction of documents in the test split", limit=BELOW_ONE)
    min_sentences: int = option(2, "shorter documents are left out (sentences)", limit=COUNT)
    max_documents: int | None = option(None, "stop after so many documents", limit=COUNT)
    shard_documents: int = option(
        1000, "documents per shard: the unit that is resumed, and the memory in use", limit=COUNT
    )
    kmeans_iterations: int = option(20, "k-means iterations", limit=count(100_000))
    precision: str = option(
        "auto", "encoder arithmetic; auto: bf16 where the processor has it", choices=("auto", "bf16", "fp32")
    )
    seed: int = option(0, "seed of k-means and of the sample it is fitted on", limit=SEED)


@dataclass(frozen=True, kw_only=True)
class LoopConfig(CommandConfig):
    """What every command that trains on a prepared corpus takes."""

    corpus: str = required("prepared corpus")
    out: str = required("run directory to write")
    epochs: float = option(1.0, "passes over the training split", limit=EPOCHS)
    steps: int | None = option(None, "optimiser steps; overrides --epochs", limit=COUNT)
    batch_size: int = option(32, "sequences per forward pass, of all processes together", limit=BATCH)
    lr: float = option(1e-3, "peak learning rate", limit=NOT_NEGATIVE)
    warmup: float = option(0.05, "fraction of training with linearly rising learning rate", limit=FRACTION)
    schedule: str = option("cosine", "learning rate after the warm-up", choices=("cosine", "linear", "constant"))
    weight_decay: float = option(0.0, "AdamW weight decay", limit=NOT_NEGATIVE)
    max_grad_norm: float = option(
        1.0, "gradient norm, per parameter group, above which gradients are scaled down", limit=POSITIVE
    )
    validate_every: int | None = option(
        None,
        "steps between measurements of the loss on the validation split; what is trained is then that of the best one, "
        "whose checkpoint is kept, and not of the last step; default: never",
        limit=COUNT,
    )
    validate_documents: int = option(
        100, "documents of the validation split, from its first on, that --validate-every measures on", limit=COUNT
    )
    patience: int | None = option(
        None,
        "end training after so many measurements of --validate-every in a row without a better one; default: never",
        limit=COUNT,
    )
    checkpoint_every: int = option(500, "steps between checkpoints", limit=COUNT)
    keep_checkpoints: int = option(2, "checkpoints kept", limit=COUNT)
    log_every: int = option(10, "steps between lines of metrics.jsonl", limit=COUNT)
    tensorboard: bool = option(False, "write OUT/tensorboard too, with planlm[tensorboard] installed")
    seed: int = option(0, "seed of initialisation, order and everything drawn", limit=SEED)
    resume: bool = option(False, "continue from the newest sound checkpoint in --out")


@dataclass(frozen=True, kw_only=True)
class PlannerConfig(LoopConfig):
    """Pre-train the planner on next-action prediction."""

    layers: int = option(2, "planner transformer layers", limit=count(256))
    heads: int | None = option(None, "attention heads; default: one per 64 channels", limit=count(10_000))
    dropout: float = option(0.1, "dropout in the planner", limit=BELOW_ONE)
    context: int | None = option(
        None, "sentences that the planner sees, the last ones; default: all of the document so far", limit=COUNT
    )
    horizon: int = option(
        1, "next actions that are predicted from each state, by a head each; the loss is their mean", limit=count(64)
    )
    soft_targets: float | None = option(
        None,
        "temperature T (a squared distance) of targets softmax(-|x - E_k|^2 / T) over the centroids E, where x is the "
        "sentence's own embedding; default: its nearest centroid alone",
        limit=TEMPERATURE,
    )
    epochs: float = option(4.0, "passes over the training documents", limit=EPOCHS)
    batch_size: int = option(32, "documents per step (the papers'), of all processes together", limit=BATCH)
    weight_decay: float = option(0.01, "AdamW weight decay", limit=NOT_NEGATIVE)
    log_every: int = option(20, "steps between lines of metrics.jsonl", limit=COUNT)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """Fine-tune planner and LM jointly."""

    lm: str | None = option(None, "causal LM, by hub name or folder; default: the LM whose tokenizer the corpus used")
    planner: str | None = option(None, "run directory of pretrain-planner; without one the planner starts untrained")
    selection: str = option("soft", "what the LM is conditioned on (docs/method.md)", choices=tuple(SELECTIONS))
    temperature: float = option(1.0, "softmax temperature of the mixture", limit=TEMPERATURE)
    top_k: int | None = option(None, "actions kept by --selection top-k", limit=COUNT)
    gumbel_scale: float = option(1.0, "scale of the Gumbel noise", limit=NOT_NEGATIVE)
    conditioning: str = option(
        "adapter",
        "how the plan enters the LM; adapter (the papers'): added to attention's output in each conditioned layer; "
        "embedding: added to the token embeddings; insert: a position of its own before each sentence; bottleneck: not "
        "at all, a control with as many weights, for --selection fixed",
        choices=CONDITIONINGS,
    )
    codebook_per_layer: bool = option(
        False, "with adapter: a codebook for each conditioned layer (the authors' code); default: one for all"
    )
    conditioned_layers: int | None = option(
        None,
        "number of topmost LM layers conditioned; default: all but the first two (the papers')",
        limit=count(10_000),
    )
    attention_window: int | None = option(
        None,
        "tokens that each layer of the LM attends to, its own included, in evaluation and generation too; default: all",
        limit=TOKENS,
    )
    gate: bool = option(
        False, "with adapter and embedding: multiply the plan with a gate per channel, initialised with zero"
    )
    lm_mode: str = option(
        "freeze",
        "freeze: only adapter, codebook and planner train; lora: low-rank additions to the LM's linear layers too; "
        "full: all of the LM",
        choices=("freeze", "lora", "full"),
    )
    lora_rank: int = option(16, "inner size of the additions of --lm-mode lora", limit=count(4096))
    lora_alpha: float = option(32.0, "scale of the additions of --lm-mode lora, times the rank", limit=POSITIVE)
    freeze_planner: bool = option(False, "keep the planner as pre-trained")
    unfreeze_planner_at: float = option(
        0.4, "fraction of training after which the planner joins; 0: from the start", limit=FRACTION
    )
    unfreeze_codebook_at: float = option(
        0.0, "fraction of training after which the codebook joins; 1: never", limit=FRACTION
    )
    planner_loss: float = option(0.0, "weight of the planner's own cross-entropy in the loss", limit=NOT_NEGATIVE)
    planner_input: str = option(
        "embeddings",
        "what the planner reads of each sentence: the encoder's embedding; lm: the mean of the LM's states of its "
        "tokens, through which the loss reaches the LM; both: their sum",
        choices=PLANNER_INPUTS,
    )
    planner_lm_layers: int | None = option(
        None,
        "with --planner-input lm or both: LM layers below the states that the planner reads; default: all below the "
        "first conditioned layer, at no extra cost",
        limit=count(10_000),
    )
    oracle_mix: str = option("0", "weight of the oracle actions, RHO or RHO:RHO_END over training")
    oracle_mode: str = option(
        "sampled", "sampled: per sentence, either; convex: always the weighted mean", choices=("sampled", "convex")
    )
    oracle_schedule: str = option(
        "linear",
        "shape of RHO:RHO_END; switch: RHO until --oracle-switch-at, RHO_END from there on",
        choices=("linear", "cosine", "switch"),
    )
    oracle_switch_at: float = option(
        0.5, "fraction of training after which --oracle-schedule switch switches", limit=FRACTION
    )
    kl: float = option(
        0.0,
        "weight of the divergence (KL, nats a token) of the LM with the plan off from the LM as it was, against "
        "forgetting; --lm-mode full keeps a frozen copy for it, 4 bytes a weight on every process",
        limit=NOT_NEGATIVE,
    )
    rehearsal: str | None = option(
        None,
        "prepared corpus, of the same tokenizer, of which every forward pass is followed by as many windows with the "
        "plan off, against forgetting; default: none",
    )
    rehearsal_weight: float = option(1.0, "weight of the cross-entropy of --rehearsal", limit=POSITIVE)
    batch_size: int = option(32, "windows per forward pass (the papers'), of all processes together", limit=BATCH)
    accumulate: int = option(1, "forward passes per optimiser step", limit=count(65_536))
    window: int = option(128, "tokens per window (the papers')", limit=TOKENS)
    lr: float = option(
        1e-3,
        "peak learning rate of the new parameters (adapter; a tenth of it with --conditioning embedding)",
        limit=NOT_NEGATIVE,
    )
    planner_lr: float = option(3e-4, "peak learning rate of the planner", limit=NOT_NEGATIVE)
    codebook_lr: float = option(1e-4, "peak learning rate of the codebook", limit=NOT_NEGATIVE)
    lm_lr: float | None = option(
        None,
        "peak learning rate of the LM; default: 5e-5 in mode full, ten times as much in lora",
        limit=NOT_NEGATIVE,
    )
    precision: str = option("auto", "auto: bf16 autocast where the processor has it", choices=("auto", "bf16", "fp32"))
    lm_dropout: float = option(
        0.0, "dropout in the LM, whatever its own configuration says; attention's has no fast kernel", limit=BELOW_ONE
    )
    loss_kernel: str = option(
        "chunked",
        "cross-entropy of the tokens; liger: Liger-Kernel's, slower and with fewer logits in memory, on CUDA, with "
        "planlm[liger] installed",
        choices=("chunked", "liger"),
    )
    compile: bool = option(False, "compile the LM with torch.compile: the first steps take minutes")
    graph: str = option(
        "auto",
        "on CUDA: capture forward and backward once for each shape of batch and replay them, which no slow host "
        "holds up; auto: in one process, without --compile, --checkpoint-activations and --loss-kernel liger",
        choices=("auto", "always", "never"),
    )
    checkpoint_activations: bool = option(
        False, "keep only each layer's input for the backward pass and compute the rest again: less memory, more time"
    )
    dry_run: bool = option(
        False, "only say what the run would cost (shapes, steps, time, memory), from a few steps; writes nothing"
    )
    shard: bool = option(False, "under torchrun: divide weights and moments among the processes (FSDP2)")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(CommandConfig):
    """Perplexity under each plan and planner metrics, with paired intervals over documents."""

    run: str = required("run directory of train, or a model folder", positional=True)
    corpus: str = required("prepared corpus")
    split: str = option("test", "split to evaluate", choices=("train", "validation", "test"))
    plans: str = option(
        "none,fixed,uniform,hard,soft,oracle",
        "comma-separated selections, each one row; also sampled: the LM's probabilities averaged over plans drawn for "
        "each sentence",
    )
    num_plans: int | None = option(None, "plans drawn for the row sampled; default: 8", limit=count(10_000))
    temperature: float | None = option(
        None, "softmax temperature of the plans; default: the one trained with", limit=TEMPERATURE
    )
    window: int | None = option(None, "tokens of context; default: the LM's, at most 1024", limit=TOKENS)
    stride: int | None = option(None, "tokens scored per window; default: the window", limit=TOKENS)
    batch_size: int = option(8, "windows per forward pass", limit=BATCH)
    max_documents: int | None = option(None, "evaluate only the first so many documents", limit=COUNT)
    versus: str = option("fixed", "row that differences and intervals refer to")
    forgetting: str | None = option(
        None,
        "prepared corpus of other text, of the same tokenizer: what the LM has lost there, and on --corpus, with the "
        "plan off; default: not measured",
    )
    forgetting_split: str | None = option(
        None,
        "split of --forgetting; default: as --split, or all documents where it has none of that name",
        choices=("train", "validation", "test", "all"),
    )
    base_lm: str | None = option(
        None, "LM before training, for --forgetting, by hub name or folder; default: that of RUN/config.yaml"
    )
    bootstrap: int = option(2000, "resamples of documents for the 95 % intervals", limit=BATCH)
    precision: str = option(
        "fp32", "arithmetic; auto: bf16 where the processor has it", choices=("auto", "bf16", "fp32")
    )
    seed: int = option(0, "seed of the bootstrap and of the row sampled", limit=SEED)


@dataclass(frozen=True, kw_only=True)
class EvaluateGenerationConfig(CommandConfig):
    """Quality of continuations of held-out documents under each plan, with paired intervals over prompts."""

    run: str = required("run directory of train, or a model folder", positional=True)
    corpus: str = required("prepared corpus")
    split: str = option("test", "split whose documents are continued", choices=("train", "validation", "test"))
    plans: str = option("none,soft", "comma-separated selections, each one row")
    versus: str = option("none", "row that differences and intervals refer to")
    prompts: int = option(100, "documents continued: the first ones that are long enough", limit=BATCH)
    prompt_sentences: int = option(3, "sentences of a document that are the prompt", limit=count(10_000))
    max_new_tokens: int = option(128, "tokens of every continuation, and of the true one (the papers')", limit=BATCH)
    temperature: float = option(1.0, "sampling temperature (the papers'); 0: greedy", limit=SAMPLING)
    top_p: float = option(0.95, "nucleus of the sampling distribution", limit=FRACTION_NOT_ZERO)
    batch_size: int = option(32, "texts generated at once", limit=BATCH)
    bootstrap: int = option(2000, "resamples of prompts for the 95 % intervals; MAUVE's takes at most 200", limit=BATCH)
    seed: int = option(0, "seed of the sampling, the bootstrap and MAUVE's k-means", limit=SEED)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(CommandConfig):
    """Continue a text, planning each sentence."""

    run: str = required("run directory of train, or a model folder", positional=True)
    prompt: str = required("text to continue")
    max_new_tokens: int = option(128, "tokens to generate", limit=BATCH)
    temperature: float = option(0.8, "sampling temperature; 0: greedy", limit=SAMPLING)
    top_p: float = option(0.95, "nucleus of the sampling distribution", limit=FRACTION_NOT_ZERO)
    plan: str | None = option(
        None,
        "actions to follow for the next sentences, by number or label, * where the planner chooses: 12,*,birth and "
        "family; afterwards the planner decides",
    )
    ban: str | None = option(None, "actions never to choose, by number or label: 12,birth and family")
    favour: str | None = option(None, "actions to choose more often, with the nats to add to their logits: 12:2.0,7:1")
    selection: str | None = option(
        None, "selection to generate with; default: the one trained with", choices=tuple(SELECTIONS)
    )
    show_plan: bool = option(False, "print each sentence with its most probable actions")
    audit: str | None = option(None, "JSON-lines file: one object per sentence with its plan")
    seed: int = option(0, "seed of the sampling", limit=SEED)


@dataclass(frozen=True, kw_only=True)
class ActionsConfig(CommandConfig):
    """What each action means: label, size, terms, typical sentences, place in a document, what follows."""

    corpus: str = required("prepared corpus", positional=True)
    action: int | None = option(None, "only this action, with more examples", limit=NUMBER)
    examples: int = option(3, "typical sentences per action", limit=NUMBER)
    terms: int = option(6, "distinctive terms per action", limit=NUMBER)
    name: tuple[str, ...] | None = option(
        None, "label of an action from now on, as ACTION=LABEL; may be given several times"
    )
    run: str | None = option(None, "run directory of train whose model is to have the labels, too")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(CommandConfig):
    """One self-contained HTML page from run directories."""

    runs: tuple[str, ...] = required("run directories", positional=True)
    out: str = option("report.html", "page to write")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(CommandConfig):
    """What this machine offers."""


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig(CommandConfig):
    """The whole path on real text and real pre-trained weights, from packages alone."""

    out: str = option("quickstart", "folder for everything that is made")
    seed: int = option(0, "seed of every stage", limit=SEED)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(CommandConfig):
    """Rows, seeds and LMs of a YAML file to tables and curves; goes on after any interruption."""

    file: str = required("YAML file that describes the experiment (docs/experiments.md)", positional=True)
    corpus: str | None = option(None, "prepared corpus; default: what the file says")
    out: str | None = option(None, "folder for everything that is made; default: experiment-NAME")
    jobs: int | None = option(
        None,
        "cells at a time, which share the cores; default: one for each GPU, or for each core with 4 GB of memory",
        limit=count(4096),
    )


@dataclass(frozen=True, kw_only=True)
class SmallLMConfig(CommandConfig):
    """A GPT-2 that the quickstart or an experiment trains itself; of the quickstart's size unless told otherwise."""

    vocabulary: int = option(4096, "tokens of its byte-level BPE tokenizer", limit=count(1_000_000))
    layers: int = option(4, "transformer layers", limit=count(256))
    width: int = option(256, "channels; heads have 64", limit=count(65_536))
    context: int = option(1024, "positions (tokens)", limit=TOKENS)
    window: int = option(64, "tokens per window", limit=TOKENS)
    batch_size: int = option(16, "windows per step", limit=BATCH)
    steps: int = option(800, "optimiser steps", limit=COUNT)
    lr: float = option(2e-3, "peak learning rate; linear warm-up and decay", limit=NOT_NEGATIVE)
    seed: int = option(0, "seed of the weights and the order of windows", limit=SEED)
