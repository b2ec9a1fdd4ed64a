"""A model trained by several ranks: replicated (DDP) or sharded (FSDP2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from planlm.distribution import all_reduce, world_size


class Parallel:
    """Calls the model and averages its gradients over all ranks.

    Args:
        model: on this rank's device, with the same weights on every rank.
        layers: these are sharded one by one, and the rest of the model together; None: the model is replicated.
        dtype: that the layers' products are computed in.
        graphs: backward passes are captured in graphs, which ranks cannot talk in: gradients lie side by side, and
            `average` sends them in one message after the step's last pass, where DDP sends them during it.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[nn.Module] | None = None,
        dtype: torch.dtype = torch.float32,
        graphs: bool = False,
    ) -> None:
        self.model = model
        self._call: Any = model
        self._gradients: list[Tensor] | None = [] if graphs and world_size() > 1 else None
        if layers is not None and world_size() > 1:
            for layer in layers:
                fully_shard(layer, mp_policy=mixed_precision(dtype))
            fully_shard(model)

    def rewrap(self) -> None:
        """Wrap the model anew after other parameters have begun to train: DDP fixes what it reduces when it is made."""
        trains = any(parameter.requires_grad for parameter in self.model.parameters())
        if self._gradients is not None:
            self._lay_out(self._gradients)
        elif world_size() > 1 and not isinstance(self.model, FSDPModule) and trains:
            self._call = None  # the old one's hooks go first
            self._call = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def __call__(self, *args: Any, last: bool = True, **kwargs: Any) -> Any:
        """The model's forward pass; gradients are reduced in the backward pass of the step's last micro-batch only."""
        if isinstance(self._call, DistributedDataParallel):
            self._call.require_backward_grad_sync = last
        elif isinstance(self._call, FSDPModule):
            self._call.set_requires_gradient_sync(last)
        return self._call(*args, **kwargs)

    def _lay_out(self, gradients: list[Tensor]) -> None:
        """Give those parameters gradients, of zeros, that train and have none: those of a dtype side by side."""
        new = [one for one in self.model.parameters() if one.requires_grad and one.grad is None]
        for dtype in dict.fromkeys(parameter.dtype for parameter in new):
            alike = [parameter for parameter in new if parameter.dtype == dtype]
            flat = alike[0].new_zeros(sum(parameter.numel() for parameter in alike), requires_grad=False)
            for parameter, part in zip(alike, flat.split([one.numel() for one in alike]), strict=True):
                parameter.grad = part.view_as(parameter)
            gradients.append(flat)

    def average(self) -> None:
        """Average gradients over ranks where their backward passes have not: once a step, when all of them are done."""
        for flat in self._gradients or ():
            all_reduce(flat.div_(world_size()))

    def weights(self) -> dict[str, Tensor]:
        """All full weights, on the CPU of rank 0; the other ranks get none of a sharded model."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found: dict[str, Any] = get_model_state_dict(self.model, options=options)
        # Each tied weight once, as a model of one rank is saved.
        own = {name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())}
        return {name: value for name, value in found.items() if name in own}

    @property
    def is_sharded(self) -> bool:
        """Whether every rank has a shard of the weights only."""
        return isinstance(self.model, FSDPModule)


def mixed_precision(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """How FSDP gathers the weights of layers whose products autocast computes in `dtype`: half as many bytes in bf16.

    Activations are left to autocast, so the sum that layers add to stays float32, and so do gradients once reduced.
    """
    if dtype == torch.float32:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded or partial one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed a step: the same numbers whenever it is run, others on every rank.

    So no random state has to be stored, and a run resumes on another number of ranks.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))
