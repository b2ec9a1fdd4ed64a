"""A model trained by several processes: replicated (DDP) or with its weights divided among them (FSDP2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from planlm.distribution import world_size


class Parallel:
    """Calls the model and sees to it that every process gets the mean of all processes' gradients.

    Args:
        model: on this process's device, the same on all of them.
        layers: with these the weights are divided, layer by layer and the rest together; without, every process has
            all of them.
    """

    def __init__(self, model: nn.Module, layers: list[nn.Module] | None = None) -> None:
        self.model = model
        self._call: Any = model
        if layers is not None and world_size() > 1:
            for layer in layers:
                fully_shard(layer)
            fully_shard(model)

    def rewrap(self) -> None:
        """Take note that other parameters train from now on: what DDP exchanges is fixed when it is made."""
        trains = any(parameter.requires_grad for parameter in self.model.parameters())
        if world_size() > 1 and not isinstance(self.model, FSDPModule) and trains:
            self._call = None  # the old one's hooks go first
            self._call = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def __call__(self, *args: Any, last: bool = True, **kwargs: Any) -> Any:
        """The model's forward pass. Gradients are exchanged in the backward pass of a step's last one only."""
        if isinstance(self._call, DistributedDataParallel):
            self._call.require_backward_grad_sync = last
        elif isinstance(self._call, FSDPModule):
            self._call.set_requires_gradient_sync(last)
        return self._call(*args, **kwargs)

    def weights(self) -> dict[str, Tensor]:
        """All weights, whole and on the CPU, on the first process; on the others nothing where they are divided."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found: dict[str, Any] = get_model_state_dict(self.model, options=options)
        # Each tied weight once, as it is saved from one process.
        own = {name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())}
        return {name: value for name, value in found.items() if name in own}

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are divided."""
        return isinstance(self.model, FSDPModule)


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor of which each process may have a part, or a sum that is still to be made."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step: the same whenever it is run, others in every process.

    So no random state has to be stored, and a run resumes on another number of processes.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))
