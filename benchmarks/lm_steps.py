"""Whole training steps as `benchmarks.predict` counts them: models, batches and variants, on tensors without data.

A step is forward and backward under bf16 autocast over float32 weights, clipping of the gradients' norm, and fused
AdamW. Sequences are packed: a token attends to its own document. The LMs have no dropout.

Sizes: B sequences of W positions, S sentences, K = 1024 actions, A = 384 (MiniLM), D the conditioned layers' stacked
widths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from benchmarks.operators import Kernel, Pretended, count_update, counted
from benchmarks.step import ACTION_DIM, MODELS, NUM_ACTIONS, SENTENCE, joint_model
from planlm.model.families import input_width, output_projections
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.planner import Planner
from planlm.plan_inputs import PlanInputs
from planlm.speedups.counted import parts_as_on_cuda
from planlm.training.flops import lm_flops

META = torch.device("meta")


@dataclass(frozen=True)
class Model:
    """An LM and the batch of a step."""

    name: str
    config: PretrainedConfig
    batch: int  # B
    window: int  # W

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.window


LMS = {
    model.name: model
    for model in (
        Model("gpt2", MODELS["gpt2"], 16, 1024),
        Model("smollm2", MODELS["smollm2"], 16, 1024),
        Model("olmo-1b", MODELS["olmo-1b"], 4, 2048),
    )
}
"""GPT-2-small, SmolLM2-135M, OLMo-1B."""

Forward = Callable[[], Tensor]
"""The loss of a step."""


@dataclass(frozen=True)
class Batch:
    """A packed batch, without data. Nobody knows how long documents are: attention's work is that of whole rows."""

    input_ids: Tensor  # int64 [B, W]
    documents: Tensor  # int64 [B, W], numbers within a sequence
    labels: Tensor  # int64 [B, W]
    layout: dict[str, Any]  # as `PlanBatch` has it
    plan: PlanInputs

    @classmethod
    def of(cls, model: Model) -> Batch:
        """As many sentences as the mean of Wikipedia's gives, one planner sequence for each of the LM's."""

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=META)

        rows, sentences = model.batch, -(-model.window // SENTENCE)
        of_tokens = (rows, model.window)
        plan = PlanInputs(
            segment_ids=empty(*of_tokens),
            segment_rows=empty(rows * sentences, 2),
            sentence_embeddings=empty(rows, sentences, ACTION_DIM, dtype=torch.float32),
            sentence_positions=empty(rows, sentences),
            segment_bounds=empty(rows * sentences + 1, dtype=torch.int32),
            sentence_cu_seqlens=empty(2 * rows + 1, dtype=torch.int32),
            sentence_longest=sentences,
        )
        offsets = empty(2 * rows + 1, dtype=torch.int32)
        layout = {"position_ids": empty(*of_tokens), "cu_seqlens": offsets, "longest": model.window}
        return cls(empty(*of_tokens), empty(*of_tokens), empty(*of_tokens), layout, plan)

    def mask(self) -> Tensor:
        """What a packed sequence's tokens see, as transformers makes it: bool `[B, 1, W, W]`."""
        at = torch.arange(self.input_ids.shape[1], device=META)
        same = self.documents[:, :, None] == self.documents[:, None, :]
        return ((at <= at[:, None]) & same)[:, None]


def plain_eager(model: Model, batch: Batch) -> tuple[nn.Module, Forward]:
    """transformers' LM and loss, all logits, and its mask for packed sequences."""
    lm = _lm(model)
    return lm, lambda: _lm_loss(lm, batch)


def eager_joint(model: Model, batch: Batch) -> tuple[nn.Module, Forward]:
    """The same with the method in eager PyTorch as well as it goes: `benchmarks.block.strong_eager`."""
    lm = _lm(model)
    planner = Planner(ACTION_DIM, NUM_ACTIONS, layers=2, heads=6, dropout=0.0)
    conditioned = output_projections(lm)[2:]
    widths = [input_width(projection) for projection in conditioned]
    codebook, adapter = nn.Parameter(torch.empty(NUM_ACTIONS, ACTION_DIM)), nn.Linear(ACTION_DIM, sum(widths))
    plans: list[Tensor] = []
    ids = batch.plan.segment_ids.flatten()
    for layer, projection in enumerate(conditioned):

        def add(_: nn.Module, inputs: tuple[Tensor, ...], layer: int = layer) -> tuple[Tensor, ...]:
            planned = plans[layer].index_select(0, ids).view_as(inputs[0])
            return (planned.add_(inputs[0]) if planned.dtype == inputs[0].dtype else planned + inputs[0], *inputs[1:])

        projection.register_forward_pre_hook(add)

    def loss() -> Tensor:
        states = planner(batch.plan.sentence_embeddings, batch.plan.sentence_positions)
        logits = planner.head(states[batch.plan.segment_rows.unbind(1)])
        plan = adapter(logits.softmax(dim=-1).to(logits.dtype) @ codebook)  # [S, D]
        padded = nn.functional.pad(plan, (0, 0, 1, 0))
        plans[:] = padded.split(widths, dim=1)
        return _lm_loss(lm, batch)

    whole = nn.ModuleList([lm, planner, adapter])
    whole.register_parameter("codebook", codebook)
    return whole, loss


def planlm_plain(model: Model, batch: Batch) -> tuple[nn.Module, Forward]:
    """`planlm train --selection none`."""
    return _planlm(model, batch, "none")


def planlm_joint(model: Model, batch: Batch) -> tuple[nn.Module, Forward]:
    """`planlm train`, planner and codebook training."""
    return _planlm(model, batch, "soft")


Variant = Callable[[Model, Batch], tuple[nn.Module, Forward]]
"""One way to train: builds what trains, and its forward pass."""

VARIANTS: dict[str, Variant] = {
    "plain eager": plain_eager,
    "strong eager joint": eager_joint,
    "planlm plain": planlm_plain,
    "planlm joint": planlm_joint,
}


def count_step(model: Model, variant: Variant, tables: int) -> tuple[list[Kernel], float]:
    """The kernels of one training step, and the FLOPs of its LM.

    Args:
        model: the LM and its batch.
        variant: how it is trained.
        tables: the architecture whose tiles PlanLM's kernels take.
    """
    with torch.device(META):
        module, forward = variant(model, Batch.of(model))
    module.train()
    with counted(tables) as counter:
        with Pretended(counter):
            loss = forward()
        counter.phase = "backward"
        loss.backward()
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        count_update(counter, trained)
    lm = next(part for part in module.modules() if isinstance(part, PreTrainedModel) and not _is_planlm(part))
    return counter.kernels, lm_flops(lm, model.tokens, model.window, trained=True)


def _is_planlm(module: nn.Module) -> bool:
    return isinstance(module, PlanLMForCausalLM)


def _lm(model: Model) -> PreTrainedModel:
    lm: PreTrainedModel = AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa")
    return lm


def _lm_loss(lm: PreTrainedModel, batch: Batch) -> Tensor:
    mask = batch.mask()
    loss: Tensor = lm(batch.input_ids, attention_mask=mask, labels=batch.input_ids, shift_labels=batch.labels).loss
    return loss


def _planlm(model: Model, batch: Batch, selection: str) -> tuple[nn.Module, Forward]:
    joint = joint_model(_lm(model), selection)
    if selection == "none":
        for part in (joint.planner, joint.adapter):
            assert part is not None
            part.requires_grad_(False)

    def loss() -> Tensor:
        with parts_as_on_cuda():
            found = joint(batch.input_ids, **batch.layout, shift_labels=batch.labels, plan=batch.plan, use_cache=False)
        summed: Tensor = found.nll_sum
        return summed

    return joint, loss


def part_of(kernel: Kernel) -> str:
    """What a kernel of a step belongs to."""
    if kernel.product is not None:
        return "products"
    if kernel.attention or kernel.name == "mask to bias":
        return "attention"
    if kernel.launch is not None:
        return kernel.name
    if kernel.phase == "update":
        return "update"
    return kernel.name
