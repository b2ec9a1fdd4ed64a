"""Validation while a run trains: the loss on held-out documents now and then, the best step, and when to stop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from planlm.config import LoopConfig
from planlm.distribution import all_reduce
from planlm.precision import device
from planlm.training.prefetch import Loader

if TYPE_CHECKING:
    import datasets

    from planlm.corpus.store import PreparedCorpus

Losses = Callable[[Any], tuple[Tensor, Tensor]]
"""Of a batch on the device: the sum of its labelled items' losses (nats), and how many there are."""


@dataclass(kw_only=True)
class Validation:
    """When to measure, and what was found; every rank finds the same.

    Attributes:
        measure: the loss on the validation split as the model is now.
        every: steps between measurements; the last step is measured too. None: never.
        patience: training ends after so many in a row without a better one; None: never.
        best_step, best_loss: of the best so far; step 0 where there is none. What is not finite is never the best.
        waited: measurements since.
        note: of the newest, for the line of progress.
    """

    measure: Callable[[], float] = lambda: math.nan
    every: int | None = None
    patience: int | None = None
    best_step: int = 0
    best_loss: float = math.inf
    waited: int = 0
    note: str = ""

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to measure after `step` (1-based) of `steps`."""
        return self.every is not None and (step % self.every == 0 or step == steps)

    def after(self, step: int, steps: int) -> dict[str, float]:
        """Measure where it is due after `step` (1-based) of `steps`; what is to be logged of it."""
        if not self.is_due(step, steps):
            return {}
        loss = self.measure()
        if loss < self.best_loss:
            self.best_step, self.best_loss, self.waited = step, loss, 0
        else:
            self.waited += 1
        self.note = f", validation {loss:.4f} (best {self.best_loss:.4f} at step {self.best_step})"
        return {"validation_loss": loss}

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.waited >= self.patience

    @property
    def best(self) -> dict[str, Any]:
        """The best so far, if there is one, for checkpoints and results."""
        return {"best_step": self.best_step, "best_loss": self.best_loss} if self.best_step else {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has of it."""
        return {"waited": self.waited, **self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.waited = state.get("waited", 0)
        self.best_step, self.best_loss = state.get("best_step", 0), state.get("best_loss", math.inf)


def first_documents(corpus: PreparedCorpus, config: LoopConfig) -> datasets.Dataset:
    """What `--validate-every` measures on. Raises InputError where the corpus has no validation split."""
    split = corpus.split("validation")
    return split.select(range(min(config.validate_documents, len(split))))


def validation(config: LoopConfig, model: nn.Module, loader: Loader | None, losses: Losses) -> Validation:
    """Validation by a model's mean loss over an epoch of `loader`, always the same one; none without a loader."""
    if loader is None:
        return Validation()

    @torch.no_grad()
    def measure() -> float:
        sums = torch.zeros(2, dtype=torch.float64, device=device())
        with evaluating(model):
            for batch in loader:
                sums += torch.stack(losses(batch.to(device())))
        loss, count = all_reduce(sums).tolist()
        return loss / max(1.0, count)

    return Validation(measure=measure, every=config.validate_every, patience=config.patience)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode; afterwards each of its modules is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
