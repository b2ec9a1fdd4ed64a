"""What keeps an LM from forgetting: nearness to the LM it was, and a second corpus, both with the plan off."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from planlm.config import TrainConfig
from planlm.corpus.batches import IGNORED, PlanBatch
from planlm.distribution import all_reduce, world_size
from planlm.model.lora import without_lora
from planlm.model.modeling import PlanLMForCausalLM
from planlm.precision import autocast
from planlm.training.figures import Figures
from planlm.training.parallel import Parallel
from planlm.training.prefetch import Loader
from planlm.training.validation import evaluating


class Guards:
    """`kl * KL(base || LM) + rehearsal_weight * CE(rehearsal tokens)`, with the plan off.

    The divergence is a mean over the labels of a step's own batches and, where there are such, of the rehearsal's.

    Args:
        parallel: the joint model.
        config: the command's configuration.
        base: what `base_model` gave before the model was divided or trained.
    """

    def __init__(self, parallel: Parallel, config: TrainConfig, base: PlanLMForCausalLM | None) -> None:
        self.parallel, self.config, self._base = parallel, config, base
        self._model: PlanLMForCausalLM = parallel.model  # type: ignore[assignment]

    def backward(
        self, batches: list[PlanBatch], rehearsal: list[PlanBatch], own: Tensor
    ) -> tuple[float | Tensor, Figures]:
        """Forward and backward; gradients add up in the parameters, and are not reduced over ranks yet.

        Args:
            batches: a step's own.
            rehearsal: those of the second corpus.
            own: labels of a step's own batches on all ranks, on the device.

        Returns:
            (what is added to the loss, figures "kl" and "rehearsal_loss" as far as they are asked for).
        """
        config, device = self.config, self._model.device
        rehearsal = [batch.to(device) for batch in rehearsal]
        repeated = torch.zeros((), dtype=torch.int64, device=device)
        if rehearsal:
            repeated = all_reduce(torch.stack([count_labels(batch) for batch in rehearsal]).sum())
        compared, repeated = (own + repeated).clamp(min=1), repeated.clamp(min=1)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for number, batch in enumerate([*rehearsal, *(batches if config.kl > 0 else [])]):
            batch = batch.to(device)
            reference = self._reference(batch) if config.kl > 0 else None
            with autocast(config.precision, device):
                output = self.parallel(
                    batch.input_ids,
                    **batch.layout,
                    shift_labels=batch.labels,
                    selection="none",
                    reference=reference,
                    use_cache=False,
                    last=False,
                )
            loss = torch.zeros((), device=device)
            if number < len(rehearsal):
                loss = loss + config.rehearsal_weight * output.nll_sum / repeated
                sums[1] += output.nll_sum.detach()
            if output.kl_sum is not None:
                loss = loss + config.kl * output.kl_sum / compared
                sums[0] += output.kl_sum.detach()
            (world_size() * loss).backward()  # gradients are averaged over processes
        kl, nll = all_reduce(sums)
        figures = {"kl": kl / compared} if config.kl > 0 else {}
        if config.rehearsal is not None:
            figures["rehearsal_loss"] = nll / repeated
        added = config.kl * figures.get("kl", 0.0) + config.rehearsal_weight * figures.get("rehearsal_loss", 0.0)
        return added, figures

    @torch.no_grad()
    def _reference(self, batch: PlanBatch) -> tuple[Tensor, Any]:
        """Last hidden states of the base LM, and its head where that is another than the LM's."""
        model = self._base or self._model
        with autocast(self.config.precision, model.device), evaluating(model), without_lora(model):
            output = model(
                batch.input_ids,
                **batch.layout,
                selection="none",
                output_hidden_states=True,
                logits_to_keep=1,
                use_cache=False,
            )
        return output.hidden_states[-1], None if self._base is None else model.get_output_embeddings()


def count_labels(batch: PlanBatch) -> Tensor:
    """Labels of a batch, int64 `[]` on its device."""
    return (batch.labels != IGNORED).sum()


def base_model(model: PlanLMForCausalLM, config: TrainConfig) -> PlanLMForCausalLM | None:
    """A frozen copy of a model that is about to train, where `--kl` needs one: LoRA can be left out of its own."""
    if config.kl == 0 or config.lm_mode == "lora":
        return None
    return copy.deepcopy(model).requires_grad_(False)


class WithRehearsal:
    """A loader's batches, each with the next one of another loader, which has epochs of its own."""

    def __init__(self, loader: Loader, rehearsal: Loader) -> None:
        self._loader, self._rehearsal = loader, rehearsal

    @property
    def epoch(self) -> int:
        """Of the first loader."""
        return self._loader.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        """The second one's goes on by itself."""
        self._loader.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        # Begun anew with every epoch of the first, the second goes on where it was.
        return zip(self._loader, self._endless(), strict=False)

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from self._rehearsal
            self._rehearsal.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """Positions of both."""
        return {**self._loader.state_dict(), "rehearsal": self._rehearsal.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from positions that `state_dict` gave."""
        self._loader.load_state_dict(state)
        self._rehearsal.load_state_dict(state["rehearsal"])
