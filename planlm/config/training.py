"""What the commands that train take."""

from __future__ import annotations

from dataclasses import dataclass

from planlm.config.base import CONDITIONINGS, PLANNER_INPUTS, CommandConfig, option, required
from planlm.selections import SELECTIONS
from planlm.settings import (
    BATCH,
    BELOW_ONE,
    COUNT,
    EPOCHS,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    TEMPERATURE,
    TOKENS,
    count,
)


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
    tracker: str | None = option(
        None,
        "where the figures of metrics.jsonl go too: OUT/tensorboard, or Weights & Biases, with planlm[tensorboard] or "
        "planlm[wandb] installed; default: nowhere",
        choices=("tensorboard", "wandb"),
    )
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

    lm: str | None = option(
        None,
        "causal LM, by hub name or folder, or the run directory or model folder of an earlier train, whose joint model "
        "trains on; default: the LM whose tokenizer the corpus used",
    )
    planner: str | None = option(
        None, "run directory of pretrain-planner; default: a joint model's own, or else an untrained one"
    )
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
    mix: tuple[str, ...] | None = option(
        None,
        "CORPUS=SHARE: a prepared corpus of the same tokenizer and actions (prepare --codebook), and its share of the "
        "windows, such as news=0.3; the rest are those of --corpus, of which --epochs counts; may be given often",
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
        "holds up; auto: in one process, without --checkpoint-activations and --loss-kernel liger",
        choices=("auto", "always", "never"),
    )
    checkpoint_activations: bool = option(
        False, "keep only each layer's input for the backward pass and compute the rest again: less memory, more time"
    )
    sample_every: int | None = option(
        None,
        "steps between samples: some prompts continued by the model as it is, always by the same random numbers, with "
        "their plans, in OUT/samples.jsonl; default: never",
        limit=COUNT,
    )
    sample_prompts: str | None = option(
        None,
        "file of prompts for --sample-every, as generate --prompts takes it; default: the first sentences of the first "
        "three documents of the validation split",
    )
    dry_run: bool = option(
        False, "only say what the run would cost (shapes, steps, time, memory), from a few steps; writes nothing"
    )
    shard: bool = option(False, "under torchrun: divide weights and moments among the processes (FSDP2)")


@dataclass(frozen=True, kw_only=True)
class PlanBudgetConfig(TrainConfig):
    """Time and memory that a run of train needs, here and on 1, 8 and 64 GPUs, and what planning adds."""

    out: str = option("", "nothing is written there: only so that the options of train can stay as they are")
