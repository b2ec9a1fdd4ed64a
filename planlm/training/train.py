"""Joint fine-tuning of planner and LM: docs/method.md's objective, selections, oracle mixing and delayed unfreezing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planlm.config import TrainConfig
from planlm.corpus.batches import PlanBatch, PlanLoader
from planlm.corpus.store import PreparedCorpus
from planlm.distribution import all_reduce, all_reduce_sum, on_rank_zero, rank, world_size
from planlm.errors import InputError
from planlm.model.families import lm_layers, set_dropout
from planlm.model.loading import lm_config, save_model
from planlm.model.lora import lora_parameters, merged
from planlm.model.loss import usable_loss
from planlm.model.modeling import PlanLMForCausalLM, PlanLMOutput
from planlm.model.planner import Planner
from planlm.precision import autocast, compute_dtype, device, matrix_product_rate
from planlm.pretrained.tokenizer import load_tokenizer, tokenizer_fingerprint
from planlm.selections import SELECTIONS
from planlm.training.flops import lm_flops
from planlm.training.groups import ParameterGroup
from planlm.training.identity import check_encoder, identify
from planlm.training.loop import Task, check_batch_size, fit, num_steps
from planlm.training.parallel import Parallel
from planlm.training.run_directory import Run, check_out
from planlm.training.schedules import oracle_ratio, parse_oracle_mix
from planlm.training.sentence_rng import uniform_by_sentence

BIAS_REACH = 0.5
"""Times the square root of A: learning rate of the adapter's bias, in those of its weight.

Adam moves a weight by up to a learning rate a step, and so `W m` by up to `lr * |m|_1`, which for centroids of unit
vectors (norm about .6) is about `0.5 sqrt(A)` learning rates. At one learning rate the bias cannot keep up, and a plan
that never changes learns what all text has in common faster than one that does: with few steps `fixed` then beats
even `oracle` (dev/log.md).
"""


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a joint model on a prepared corpus and write `model/` into the run directory.

    Returns:
        The run directory, the model's folder, and the figures of the last logged step.

    Raises:
        InputError: contradicting settings, a corpus of another tokenizer, a planner of another corpus, an unsupported
            LM, or a run directory in use.
    """
    ratios = parse_oracle_mix(config.oracle_mix)
    _check(config, ratios)
    check_batch_size(config.batch_size)
    check_out(config)
    corpus = PreparedCorpus.load(config.corpus)
    check_encoder(corpus)
    lm = config.lm or corpus.manifest.tokenizer
    if tokenizer_fingerprint(load_tokenizer(lm)) != corpus.manifest.tokenizer_fingerprint:
        raise InputError(
            f"{config.corpus}: prepared with the tokenizer of {corpus.manifest.tokenizer}, which is not that of {lm}; "
            f"prepare a corpus with --tokenizer {lm}"
        )
    if config.top_k is not None and config.top_k > corpus.manifest.num_actions:
        raise InputError(
            f"--top-k {config.top_k}: {config.corpus} has {corpus.manifest.num_actions} actions; set fewer"
        )
    context = lm_config(lm).max_position_embeddings
    if config.window > context:
        raise InputError(f"--window {config.window}: the context of {lm} is {context} tokens; set at most that")
    planner = Planner.load(Path(config.planner) / "planner") if config.planner else None
    loader = PlanLoader(
        corpus.split("train"), window=config.window, batch_size=config.batch_size, seed=config.seed, pack=True
    )
    loader.share = (rank(), world_size())
    steps = num_steps(config, loader.num_batches, config.accumulate)
    model = _model(config, corpus, lm, planner)
    identity = on_rank_zero(lambda: identify(corpus, model.lm, planner))
    parallel = Parallel(model, lm_layers(model.lm) if config.shard else None)
    groups = trainable_groups(model, config, steps)
    objective = Objective(parallel, config, steps, ratios)
    full = config.lm_mode == "full"
    below = model.lm.config.num_hidden_layers - model.config.conditioned_layers
    first_layer = below if config.lm_mode == "freeze" else 0

    def flops(batches: list[PlanBatch]) -> float:
        num_tokens = sum(batch.input_ids.numel() for batch in batches)
        return lm_flops(model.lm, num_tokens, config.window, trained=full, first_layer=first_layer)

    rate = matrix_product_rate(compute_dtype(config.precision, model.device), model.device)
    task = Task(parallel, groups, loader, config.accumulate, steps, objective.backward, flops, rate)
    with Run(config, identity) as run:
        fit(task, run, config)
        return _finish(parallel, run, config)


def _finish(parallel: Parallel, run: Run, config: TrainConfig) -> dict[str, Any]:
    """Write `model/`; what `train` returns."""
    model: PlanLMForCausalLM = parallel.model  # type: ignore[assignment]
    model.eval()
    has_lora = config.lm_mode == "lora"
    weights = parallel.weights() if parallel.is_sharded or has_lora else None

    def finish() -> dict[str, Any]:
        own = merged(model, weights) if has_lora and weights is not None else weights
        folder = save_model(model.cpu() if own is None else model, run.path / "model", own)
        last = {key: value for key, value in run.last_line().items() if isinstance(value, int | float)}
        return {"run": str(run.path), "model": str(folder), "selection": config.selection, **last}

    return on_rank_zero(finish) or {}


def _model(config: TrainConfig, corpus: PreparedCorpus, lm: str, planner: Planner | None) -> PlanLMForCausalLM:
    """The joint model on the device, ready to train."""
    loss_kernel = usable_loss(config.loss_kernel, device())
    torch.manual_seed(config.seed)
    model = PlanLMForCausalLM.from_lm(
        lm,
        corpus.codebook,
        planner=planner,
        conditioning=config.conditioning,
        conditioned_layers=config.conditioned_layers,
        gate=config.gate,
        selection=config.selection,
        plan_temperature=config.temperature,
        plan_top_k=config.top_k,
        gumbel_scale=config.gumbel_scale,
        encoder=corpus.manifest.encoder,
        lora=(config.lora_rank, config.lora_alpha) if config.lm_mode == "lora" else None,
    ).to(device())
    model.loss_kernel = loss_kernel
    set_dropout(model.lm, config.lm_dropout)
    if config.checkpoint_activations:
        model.lm.activation_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        model.compile_lm()
    return model


def _check(config: TrainConfig, ratios: tuple[float, float]) -> None:
    """Collect every contradiction between settings and raise once; ranges are checked by the configuration."""
    problems = []
    if config.selection == "none" and config.lm_mode == "freeze":
        problems.append(
            "--selection none with --lm-mode freeze trains nothing; choose another selection, or --lm-mode lora or full"
        )
    selection = SELECTIONS[config.selection]
    if selection.needs_top_k and config.top_k is None:
        problems.append(f"--selection {config.selection} needs --top-k")
    if not selection.needs_top_k and config.top_k is not None:
        problems.append("--top-k is for --selection top-k")
    if max(ratios) > 0 and (config.selection == "none" or selection.needs_oracle):
        problems.append(f"--oracle-mix has no meaning with --selection {config.selection}")
    if problems:
        raise InputError("; ".join(problems))


def trainable_groups(model: PlanLMForCausalLM, config: TrainConfig, steps: int) -> list[ParameterGroup]:
    """Switch gradients off everywhere, then name what trains, from which step on and how fast.

    The planner trains where the LM's loss reaches it or `--planner-loss` asks for it; the codebook in every
    selection that shows it to the LM.
    """
    model.requires_grad_(False)
    planner_learns = SELECTIONS[config.selection].trains_planner or config.planner_loss > 0
    parts: list[tuple[str, Any, float, float]] = []
    if config.selection != "none":
        adapter = dict(model.adapter.named_parameters(prefix="adapter"))
        bias = {"adapter.bias": adapter.pop("adapter.bias")}
        codebook = {"adapter.codebook": adapter.pop("adapter.codebook")}
        parts.append(("adapter", adapter.items(), config.lr, 0.0))
        parts.append(("bias", bias.items(), config.lr * BIAS_REACH * model.config.action_dim**0.5, 0.0))
        parts.append(("codebook", codebook.items(), config.codebook_lr, config.unfreeze_codebook_at))
    if planner_learns and not config.freeze_planner:
        named = model.planner.named_parameters(prefix="planner")
        parts.append(("planner", named, config.planner_lr, config.unfreeze_planner_at))
    if config.lm_mode == "full":
        parts.append(("lm", model.lm.named_parameters(prefix="lm"), _lm_lr(config), 0.0))
    if config.lm_mode == "lora":
        parts.append(("lm", lora_parameters(model.lm, prefix="lm").items(), _lm_lr(config), 0.0))
    return [
        ParameterGroup(name, dict(parameters), lr, start=round(at * steps))
        for name, parameters, lr, at in parts
        if at < 1.0
    ]


def _lm_lr(config: TrainConfig) -> float:
    """LoRA's best learning rate is about ten times that of all weights (Schulman et al., LoRA Without Regret, 2025)."""
    return config.lm_lr if config.lm_lr is not None else 5e-4 if config.lm_mode == "lora" else 5e-5


class Objective:
    """`CE(tokens) + planner_loss * CE(z, a)`, each a mean over all labelled positions of a step's batches.

    Args:
        parallel: the joint model.
        config: the command's configuration.
        steps: steps in all, for the oracle ratio's schedule.
        ratios: oracle ratio at the first and at the last step.
    """

    def __init__(self, parallel: Parallel, config: TrainConfig, steps: int, ratios: tuple[float, float]) -> None:
        model: PlanLMForCausalLM = parallel.model  # type: ignore[assignment]
        self.parallel, self.model, self.config, self.steps, self.ratios = parallel, model, config, steps, ratios
        model.train()
        if config.lm_mode == "freeze":
            model.lm.eval()  # no dropout in weights that cannot adapt to it

    def backward(self, step: int, batches: list[PlanBatch]) -> dict[str, float]:
        """Forward and backward over a step's batches; gradients add up in the parameters."""
        where = self.model.device
        num_labels, num_segments = all_reduce_sum(
            sum(int((batch.labels != -100).sum()) for batch in batches),
            sum(int((batch.actions >= 0).sum()) for batch in batches),
        )
        ratio = oracle_ratio(step, self.steps, self.ratios, self.config.oracle_schedule)
        totals = torch.zeros(4, device=where)
        for number, batch in enumerate(batches):
            batch = batch.to(where)
            with autocast(self.config.precision, where):
                output = self._forward(batch, step, ratio, last=number + 1 == len(batches))
                assert output.nll_sum is not None
                loss = output.nll_sum / num_labels
                if self.config.planner_loss > 0:
                    assert output.oracle_nll is not None
                    loss = loss + self.config.planner_loss * output.oracle_nll.sum() / num_segments
            (world_size() * loss).backward()  # gradients are averaged over processes
            totals += self._figures(output, batch.actions)
        lm_nll, planner_nll, right, entropy = all_reduce(totals).tolist()
        figures = {"tokens": num_labels, "lm_loss": lm_nll / max(1, num_labels), "oracle_ratio": ratio}
        if output.action_logits is not None:
            count = max(1, num_segments)
            figures |= {
                "planner_loss": planner_nll / count,
                "planner_accuracy": right / count,
                "planner_entropy": entropy / count,
            }
        loss_of_both = figures["lm_loss"] + self.config.planner_loss * figures.get("planner_loss", 0.0)
        return {"loss": loss_of_both, **figures}

    def _forward(self, batch: PlanBatch, step: int, ratio: float, last: bool) -> PlanLMOutput:
        weight: float | Tensor = ratio
        if ratio > 0 and self.config.oracle_mode == "sampled":
            weight = (uniform_by_sentence(batch, self.config.seed, step) < ratio).float()
        output: PlanLMOutput = self.parallel(
            batch.input_ids,
            position_ids=batch.position_ids,
            shift_labels=batch.labels,
            plan=batch.plan,
            oracle_weight=weight,
            want_oracle_nll=self.config.planner_loss > 0,
            use_cache=False,
            last=last,
        )
        return output

    @staticmethod
    @torch.no_grad()
    def _figures(output: PlanLMOutput, actions: Tensor) -> Tensor:
        """Sums over the batch: token NLL, planner NLL, planner hits, planner entropy."""
        assert output.nll_sum is not None
        if output.action_logits is None:
            return torch.stack((output.nll_sum, *output.nll_sum.new_zeros(3)))
        assert output.oracle_nll is not None
        log_p = output.action_logits.float().log_softmax(dim=-1)
        entropy = -(log_p.exp() * log_p).sum(dim=-1)[actions >= 0].sum()
        right = (log_p.argmax(dim=-1) == actions).sum()
        return torch.stack((output.nll_sum, output.oracle_nll.sum(), right.float(), entropy))
