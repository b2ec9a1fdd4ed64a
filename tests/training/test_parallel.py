"""What FSDP does with the precision that was asked for, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from planlm.training.parallel import full_tensor, mixed_precision


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Residual(nn.Module):
    """A layer that adds to a sum, as an LM's do. Its norm is Llama's: of a CPU autocast leaves nn.LayerNorm alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = LlamaRMSNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32, "the sum of the layers stays float32"
        return x + self.linear(self.norm(x))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_gathered_in_the_dtype_of_their_products(dtype: torch.dtype) -> None:
    x, found = torch.randn(4, 8), {}
    gathered: list[torch.dtype] = []
    for is_sharded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(Residual(), Residual())
        if is_sharded:
            for layer in model:
                fully_shard(layer, mp_policy=mixed_precision(dtype))
            fully_shard(model)
            model[0].linear.register_forward_pre_hook(lambda module, _: gathered.append(module.weight.dtype))
        for _ in range(2):  # gradients of two micro-batches add up
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(x).square().sum()
            loss.backward()
        gradients = [full_tensor(parameter.grad) for parameter in model.parameters()]
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        found[is_sharded] = loss, gradients
    assert set(gathered) == {dtype}
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[True], found[False], rtol=tolerance, atol=tolerance)
