"""The joint objective of docs/method.md: the tokens' cross-entropy, and the planner's as far as it is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from planlm.config import TrainConfig
from planlm.corpus.batches import PlanBatch
from planlm.corpus.sentence_rng import uniform_by_sentence
from planlm.distribution import all_reduce, world_size
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.output import PlanLMOutput
from planlm.precision import autocast
from planlm.selections import SELECTIONS
from planlm.training.figures import Figures, read_on_cpu
from planlm.training.forgetting import Guards, count_labels
from planlm.training.graphs import Graphs
from planlm.training.parallel import Parallel
from planlm.training.schedules import is_logged, oracle_ratio, parse_oracle_mix


class Objective:
    """`CE(tokens) + planner_loss * CE(z, a)`, each a mean over all labelled positions of a step's batches, and guards.

    Args:
        parallel: the joint model.
        config: the command's configuration.
        steps: steps in all, for the oracle ratio's schedule.
        guards: against forgetting, where there are any.
        graphs: capture forward and backward, see `has_graphs`.
    """

    def __init__(
        self, parallel: Parallel, config: TrainConfig, steps: int, guards: Guards | None = None, graphs: bool = False
    ) -> None:
        model: PlanLMForCausalLM = parallel.model  # type: ignore[assignment]
        self.parallel, self.model, self.config, self.steps = parallel, model, config, steps
        self.ratios, self.guards = parse_oracle_mix(config.oracle_mix), guards
        self.asks_planner = SELECTIONS[config.selection].asks_planner
        self.graphs = Graphs(self._in_graph) if graphs else None
        model.train()
        if config.lm_mode == "freeze":
            model.lm.eval()  # no dropout in weights that do not learn; the planner's follows its gradients

    def backward(self, step: int, batches: list[Any]) -> Figures:
        """Forward and backward over a step's batches; gradients add up in the parameters.

        With `--rehearsal` a batch is one of each corpus. Figures that a GPU has computed are left there.
        """
        rehearsal: list[PlanBatch] = []
        if self.config.rehearsal is not None:
            batches, rehearsal = map(list, zip(*batches, strict=True))
        config, device, planner_loss = self.config, self.model.device, self.config.planner_loss
        batches = [batch.to(device) for batch in batches]
        if (planner := self.model.planner) is not None:
            planner.train(self.model.training and any(weight.requires_grad for weight in planner.parameters()))
        # Counted and divided on the device: a host would have to wait for the sum over ranks.
        counts = [torch.stack((count_labels(batch), (batch.actions >= 0).sum())) for batch in batches]
        num_labels, num_segments = all_reduce(torch.stack(counts).sum(dim=0))
        ratio = oracle_ratio(step, self.steps, self.ratios, config.oracle_schedule, config.oracle_switch_at)
        logged = is_logged(step, self.steps, self.config.log_every)
        # First, since gradients are reduced in the last pass, which has to reach all that trains.
        guarded, found = (0.0, {}) if self.guards is None else self.guards.backward(batches, rehearsal, num_labels)
        sums = torch.zeros(4, device=device)
        for number, batch in enumerate(batches):
            weight = self._oracle_weight(batch, step, ratio)
            if self.graphs is None:
                sums += self._micro_batch(batch, [num_labels, num_segments], weight, logged, number + 1 == len(batches))
            else:
                more = [num_labels, num_segments, *([weight] if isinstance(weight, Tensor) else [])]
                trains = tuple(parameter.requires_grad for parameter in self.model.parameters())
                sums += self.graphs(batch, more, trains)
        self.parallel.average()
        lm_nll, planner_nll, right, entropy = all_reduce(sums).double()
        lm_loss, count = lm_nll / num_labels.clamp(min=1), num_segments.clamp(min=1)
        figures = {"tokens": num_labels, "lm_loss": lm_loss, "oracle_ratio": ratio, **found}
        if logged and self.model.planner is not None and (self.asks_planner or planner_loss > 0):
            figures |= {
                "planner_loss": planner_nll / count,
                "planner_accuracy": right / count,
                "planner_entropy": entropy / count,
            }
        return read_on_cpu({"loss": lm_loss + planner_loss * (planner_nll / count) + guarded, **figures})

    def losses(self, batch: PlanBatch) -> tuple[Tensor, Tensor]:
        """Of a batch: the sum of its labels' NLL, predicted without oracle actions, and their number."""
        with autocast(self.config.precision, self.model.device):
            output = self.model(
                batch.input_ids,
                **batch.layout,
                shift_labels=batch.labels,
                plan=batch.plan,
                use_cache=False,
            )
        return output.nll_sum, count_labels(batch)

    def _oracle_weight(self, batch: PlanBatch, step: int, ratio: float) -> float | Tensor:
        """Of the oracle action in each segment's plan: a number, or `[S]`."""
        if ratio > 0 and self.config.oracle_mode == "sampled":
            return (uniform_by_sentence(batch, self.config.seed, step) < ratio).float()
        if self.graphs is not None and max(self.ratios) > 0:  # a graph would go on with the number of its first step
            return torch.full(batch.actions.shape, ratio, device=batch.actions.device)
        return ratio

    def _micro_batch(
        self, batch: PlanBatch, counts: list[Tensor], weight: float | Tensor, logged: bool, last: bool
    ) -> Tensor:
        """Forward and backward of one batch; its sums. `counts` are the labels and segments of the whole step."""
        with autocast(self.config.precision, self.model.device):
            output = self._forward(batch, weight, last)
            assert output.nll_sum is not None
            loss = output.nll_sum / counts[0]
            if self.config.planner_loss > 0:
                assert output.oracle_nll is not None
                loss = loss + self.config.planner_loss * output.oracle_nll.sum() / counts[1]
        (world_size() * loss).backward()  # gradients are averaged over processes
        return _sums(output, batch.actions, logged)

    def _in_graph(self, batch: PlanBatch, more: list[Tensor]) -> Tensor:
        """`_micro_batch` as a graph holds it: of any step."""
        return self._micro_batch(batch, more[:2], more[2] if len(more) > 2 else 0.0, logged=True, last=True)

    def _forward(self, batch: PlanBatch, weight: float | Tensor, last: bool) -> PlanLMOutput:
        output: PlanLMOutput = self.parallel(
            batch.input_ids,
            **batch.layout,
            shift_labels=batch.labels,
            plan=batch.plan,
            oracle_weight=weight,
            want_oracle_nll=self.config.planner_loss > 0,
            use_cache=False,
            last=last,
        )
        return output


@torch.no_grad()
def _sums(output: PlanLMOutput, actions: Tensor, logged: bool) -> Tensor:
    """Sums over a batch: token NLL and planner NLL; for the log, the planner's hits and its entropy as well."""
    assert output.nll_sum is not None
    sums = output.nll_sum.new_zeros(4)
    sums[0] = output.nll_sum
    if output.action_logits is not None and output.oracle_nll is not None:
        sums[1] = output.oracle_nll.sum()
        if logged:
            log_p = output.action_logits.float().log_softmax(dim=-1)  # [S, K]
            sums[2] = (log_p.argmax(dim=-1) == actions).sum()
            sums[3] = -(log_p.exp() * log_p).sum(dim=-1).where(actions >= 0, 0.0).sum()
    return sums
