"""`planlm train`: fine-tune planner and LM jointly on a prepared corpus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from planlm.config import TrainConfig
from planlm.corpus.batches import PlanLoader
from planlm.corpus.mixing import MixedLoader
from planlm.corpus.store import PreparedCorpus
from planlm.distribution import on_rank_zero, rank, world_size
from planlm.errors import InputError
from planlm.model.configuration import BY_LAYER, conditioning_problems
from planlm.model.families import lm_layers
from planlm.model.loading import joint_config, save_model
from planlm.model.lora import merged
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.planner import Planner
from planlm.precision import compute_dtype, device, matrix_product_rate
from planlm.selections import SELECTIONS
from planlm.training.corpora import load_beside, load_mix, parse_mix
from planlm.training.dry_run import dry_run
from planlm.training.flops import lm_flops
from planlm.training.forgetting import Guards, WithRehearsal, base_model
from planlm.training.graphs import has_graphs
from planlm.training.groups import trainable_groups
from planlm.training.identity import check_encoder, identify
from planlm.training.loop import Task, fit, num_steps
from planlm.training.objective import Objective
from planlm.training.parallel import Parallel
from planlm.training.run_directory import Run, check_run
from planlm.training.samples import sample_problems, samples
from planlm.training.schedules import parse_oracle_mix
from planlm.training.start import check_fit, starting_model
from planlm.training.validation import Validation, first_documents, validation


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a run is made of, ready for its first step.

    Attributes:
        parallel: the joint model on its device.
        task: what the loop trains.
        objective: the loss, and `losses` without gradients' terms beside it.
        loader: windows of the corpus and of those of `--mix`, without those of `--rehearsal`.
        held_out: batches of `--validate-every`, where there are such.
        identity: fingerprints of what is trained and on what; None on ranks other than 0.
    """

    parallel: Parallel
    task: Task
    objective: Objective
    loader: PlanLoader
    held_out: PlanLoader | None
    identity: dict[str, str] | None


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a joint model on a prepared corpus and write `model/` into the run directory.

    Returns:
        The run directory, the model's folder, and the metrics of the last logged step; with `--dry-run` what `dry_run`
        gives.

    Raises:
        InputError: contradicting settings, a corpus of another tokenizer, a planner of another corpus, an unsupported
            LM, a joint model that does not fit, or a run directory in use.
    """
    built = build(config)
    if config.dry_run:
        return dry_run(built.task, config)
    with Run(config, built.identity, built.task.steps) as run:
        fit(built.task, run, config)
        return finish(built.parallel, run, config, built.task.validation) | built.task.validation.best


def build(config: TrainConfig) -> Built:
    """Check the settings and put the parts of a run together; nothing is written. Raises InputError as `train` does."""
    check_settings(config)
    graphs = has_graphs(config, device(), world_size())
    check_run(config)
    corpus = PreparedCorpus.load(config.corpus)
    check_encoder(corpus)
    lm = config.lm or corpus.manifest.tokenizer
    check_fit(config, corpus, lm)
    planner = Planner.load(Path(config.planner) / "planner") if config.planner else None
    mix = load_mix(config.mix or (), corpus)
    rehearsal = None if config.rehearsal is None else load_beside("--rehearsal", config.rehearsal, corpus)
    repeated = None if rehearsal is None else _nonempty(_loader(config, rehearsal.split("train")), "--rehearsal")
    loader = _loader(config, corpus.split("train"), mix)
    loader.alike = graphs
    held_out = None
    if config.validate_every is not None:
        held_out = _nonempty(_loader(config, first_documents(corpus, config)), "--validate-documents")
    steps = num_steps(config, loader.num_batches, config.accumulate)
    model = starting_model(config, corpus, lm, planner)
    loader.horizon = model.config.planner_horizon if config.planner_loss > 0 else 1
    begun = model.lm if joint_config(lm) is None else model
    identity = on_rank_zero(lambda: identify(corpus, begun, planner, rehearsal, mix))
    base = base_model(model, config)
    dtype = compute_dtype(config.precision, model.device)
    # In one process, and between CPUs, gathering costs nothing that rounding all of a layer's weights would be worth.
    gathered = dtype if model.device.type == "cuda" else torch.float32
    parallel = Parallel(model, lm_layers(model.lm) if config.shard else None, gathered, graphs)
    guards = Guards(parallel, config, base) if config.kl > 0 or rehearsal is not None else None
    objective = Objective(parallel, config, steps, guards, graphs)
    task = Task(
        model=parallel,
        groups=trainable_groups(model, config, steps),
        loader=loader if repeated is None else WithRehearsal(loader, repeated),
        accumulate=config.accumulate,
        steps=steps,
        backward=objective.backward,
        flops=count_flops(model, config),
        rate=matrix_product_rate(dtype, model.device),
        validation=validation(config, model, held_out, objective.losses),
        samples=samples(config, corpus, model, lm),
        keeps_gradients=graphs,
    )
    return Built(parallel=parallel, task=task, objective=objective, loader=loader, held_out=held_out, identity=identity)


def _loader(
    config: TrainConfig, dataset: datasets.Dataset, mix: Sequence[tuple[PreparedCorpus, float]] = ()
) -> PlanLoader:
    """Packed windows of a split, mixed with those of other corpora's training splits; this rank's share of them."""
    settings: dict[str, Any] = {
        "window": config.window,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "with_others": SELECTIONS[config.selection].needs_others,
        "planner_sequence_per_window": config.planner_input != "embeddings",
    }
    if mix:
        parts = {f"--mix {other.path}": (other.split("train"), share) for other, share in mix}
        rest = 1 - sum(share for _, share in mix)
        loader: PlanLoader = MixedLoader({f"--corpus {config.corpus}": (dataset, rest)} | parts, **settings)
    else:
        loader = PlanLoader(dataset, pack=True, **settings)
    loader.share = (rank(), world_size())
    return loader


def _nonempty(loader: PlanLoader, option: str) -> PlanLoader:
    """`loader`, of documents that an option names; refuses those of one token each, in which nothing is predicted."""
    if loader.num_batches == 0:
        raise InputError(f"{option}: none of those documents has a second token to predict; give others, or more")
    return loader


def count_flops(model: PlanLMForCausalLM, config: TrainConfig) -> Callable[[list[Any]], float]:
    """What counts the floating-point operations of a step's batches, those of the guards included."""
    has_lowest = config.lm_mode == "freeze" and config.conditioning in BY_LAYER
    lowest = model.lm.config.num_hidden_layers - model.config.conditioned_layers if has_lowest else 0
    seen = min(config.window, config.attention_window or config.window)
    seen_twice = 2 * seen - seen**2 / config.window  # of what a token sees on average

    def flops(batches: list[Any]) -> float:
        pairs = [item if isinstance(item, tuple) else (item,) for item in batches]
        num_tokens: float = sum(batch.input_ids.numel() for pair in pairs for batch in pair)
        if config.kl > 0:  # with the plan off too, and all of it forward in the LM as it was
            num_tokens += num_tokens / 3 + sum(pair[0].input_ids.numel() for pair in pairs)
        if config.conditioning == "insert":
            num_tokens += sum(len(pair[0].actions) for pair in pairs)
        return lm_flops(model.lm, round(num_tokens), seen_twice, trained=config.lm_mode == "full", first_layer=lowest)

    return flops


def _trained(run: Run, config: TrainConfig, validation: Validation) -> dict[str, Any]:
    """What the model card says of a run, by name: what decided it, and where it ended, as far as that is known."""
    line = run.last_line(validation.best_step or None)
    ended = {"steps": "step", "tokens": "tokens", "loss (nats)": "loss", "validation loss (nats)": "validation_loss"}
    found = {
        "corpus (fingerprint)": run.identity.get("corpus"),
        "mixed with": run.identity.get("mix"),
        "what trained of the language model": config.lm_mode,
        "tokens per window": config.window,
        "windows per step": config.batch_size * config.accumulate,
        "seed": config.seed,
        **{name: line.get(key) for name, key in ended.items()},
    }
    return {name: round(it, 3) if isinstance(it, float) else it for name, it in found.items() if it is not None}


def check_settings(config: TrainConfig) -> None:
    """Collect every contradiction between settings; ranges are checked by the configuration.

    Raises:
        InputError: names all of them.
    """
    parse_mix(config.mix or ())
    selection, problems = SELECTIONS[config.selection], []
    if config.selection == "none" and config.lm_mode == "freeze":
        problems.append(
            "--selection none with --lm-mode freeze trains nothing; choose another selection, or --lm-mode lora or full"
        )
    if selection.needs_top_k and config.top_k is None:
        problems.append(f"--selection {config.selection} needs --top-k")
    if not selection.needs_top_k and config.top_k is not None:
        problems.append("--top-k is for --selection top-k")
    if max(parse_oracle_mix(config.oracle_mix)) > 0 and (
        config.selection == "none" or selection.needs_oracle or selection.needs_others
    ):
        problems.append(f"--oracle-mix has no meaning with --selection {config.selection}")
    reads_lm = config.planner_input != "embeddings"
    learns = (selection.trains_planner or config.planner_loss > 0) and not config.freeze_planner
    learns = learns and config.unfreeze_planner_at < 1
    if reads_lm and selection.asks_planner and not selection.needs_others and not learns:
        problems.append(
            f"--planner-input {config.planner_input}: its projection starts untrained, and the planner does not train "
            "(--freeze-planner, --unfreeze-planner-at 1, or a --selection without gradient and no --planner-loss); "
            "leave it out"
        )
    if reads_lm and selection.needs_others:
        problems.append(f"--selection {config.selection} is for --planner-input embeddings: others have no LM states")
    if config.planner_lm_layers is not None and not reads_lm:
        problems.append("--planner-lm-layers is for --planner-input lm or both")
    problems += [f"--{problem}" for problem in _problems_of_conditioning(config)]
    if config.oracle_schedule == "switch" and ":" not in config.oracle_mix:
        problems.append("--oracle-schedule switch goes from RHO to RHO_END; give both, as in --oracle-mix 1:0")
    unused = {
        "oracle-switch-at": ("--oracle-schedule switch", config.oracle_schedule == "switch"),
        "rehearsal-weight": ("--rehearsal", config.rehearsal is not None),
    }
    for option, (needs, is_there) in unused.items():
        name = option.replace("-", "_")
        if not is_there and getattr(config, name) != TrainConfig.__dataclass_fields__[name].default:
            problems.append(f"--{option} is for {needs}; set that too, or leave it out")
    problems += sample_problems(config)
    if config.lm_mode == "freeze" and (config.kl > 0 or config.rehearsal is not None):
        guard = "--kl" if config.kl > 0 else "--rehearsal"
        problems.append(
            f"{guard} with --lm-mode freeze: nothing can be forgotten; leave it out, or choose lora or full"
        )
    if problems:
        raise InputError("; ".join(problems))


def _problems_of_conditioning(config: TrainConfig) -> list[str]:
    """What contradicts `--conditioning`, each named by its option, less its dashes."""
    names = ("selection", "gate", "codebook_per_layer", "planner_input")
    problems = conditioning_problems(config.conditioning, **{name: getattr(config, name) for name in names})
    if config.conditioned_layers is not None and config.conditioning not in BY_LAYER:
        problems.append(f"conditioned-layers: has no meaning with --conditioning {config.conditioning}")
    if config.conditioning == "insert" and config.attention_window == 1:
        problems.append("attention-window 1: with --conditioning insert no token would see its plan; set 2 or more")
    asks_plan = config.planner_loss > 0 or max(parse_oracle_mix(config.oracle_mix)) > 0
    if config.conditioning == "bottleneck" and asks_plan:
        problems.append("conditioning bottleneck has no plan; leave --planner-loss and --oracle-mix out")
    return problems


def finish(parallel: Parallel, run: Run, config: TrainConfig, validation: Validation) -> dict[str, Any]:
    """Write `model/`, which is whole or absent; what `train` returns."""
    model: PlanLMForCausalLM = parallel.model  # type: ignore[assignment]
    model.eval()
    has_lora = config.lm_mode == "lora"
    weights = parallel.weights() if parallel.is_sharded or has_lora else None

    def finish() -> dict[str, Any]:
        model.config.trained = _trained(run, config, validation)
        own = merged(model, weights) if has_lora and weights is not None else weights
        folder = save_model(model.cpu() if own is None else model, run.path / "model", own)
        last = {key: value for key, value in run.last_line().items() if isinstance(value, int | float)}
        return {"run": str(run.path), "model": str(folder), "selection": config.selection, **last}

    return on_rank_zero(finish) or {}
