"""What `benchmarks/step` compares: training steps of one LM, plain and planned, on the same batch.

A step is forward, backward, clipping of the gradients' norm and the optimiser's update. Weights are random: they do not
change how long anything takes.

Sizes: B rows, W positions, S sentences, K = 1024 actions, A = 384 (MiniLM), D stacked widths of conditioned layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, LlamaConfig, PreTrainedModel

from planlm.config import TrainConfig
from planlm.corpus.batches import PlanBatch
from planlm.model.configuration import PlanLMConfig
from planlm.model.families import input_width, output_projections
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.planner import Planner
from planlm.precision import autocast
from planlm.training.groups import make_optimizer
from planlm.training.loop import Task, update
from planlm.training.parallel import Parallel
from planlm.training.train import Objective, trainable_groups

NUM_ACTIONS, ACTION_DIM, SENTENCE = 1024, 384, 21
"""K, A, and tokens of a sentence: the mean of English Wikipedia's in GPT-2's tokens."""

AUTHORS_CONTEXT, AUTHORS_BATCH = 128, 256
"""Tokens that the authors' planner sees before a sentence, and sentences that they encode at a time."""

MODELS = {
    "gpt2": GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "smollm2": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}
"""GPT-2-small without dropout, as `planlm train` has it by default; SmolLM2-135M."""

Step = Callable[[], float]
"""One training step; returns the loss."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        model: key of `MODELS`.
        window: W.
        rows: B.
        dtype: "float32" or "bf16" (autocast over float32 weights).
        lm: "full" or "freeze".
    """

    model: str
    window: int
    rows: int
    dtype: str
    lm: str

    @property
    def precision(self) -> str:
        """As `--precision` has it."""
        return "bf16" if self.dtype == "bf16" else "fp32"

    def __str__(self) -> str:
        return f"{self.model} {self.window} × {self.rows} {self.dtype} {self.lm}"


def make_batch(case: Case, seed: int = 0) -> PlanBatch:
    """Rows of one document each, without padding."""
    random = torch.Generator().manual_seed(seed)
    vocabulary, shape = MODELS[case.model].vocab_size, (case.rows, case.window)
    per_row = -(-case.window // SENTENCE)
    within = (torch.arange(case.window) // SENTENCE).expand(shape)
    rows = torch.arange(case.rows)
    embeddings = torch.randn(case.rows, per_row, ACTION_DIM, generator=random)
    return PlanBatch(
        input_ids=torch.randint(vocabulary, shape, generator=random),
        position_ids=torch.arange(case.window).expand(shape),
        labels=torch.randint(vocabulary, shape, generator=random),
        segment_ids=within + per_row * rows[:, None],
        segment_rows=torch.stack((rows.repeat_interleave(per_row), torch.arange(per_row).repeat(case.rows)), dim=1),
        actions=torch.randint(NUM_ACTIONS, (case.rows * per_row,), generator=random),
        sentence_embeddings=F.normalize(embeddings, dim=-1),
        sentence_positions=torch.arange(per_row).expand(case.rows, per_row),
        documents=rows[:, None].expand(shape),
    )


def make_lm(name: str) -> PreTrainedModel:
    """The LM of this key with random weights."""
    torch.manual_seed(0)
    lm: PreTrainedModel = AutoModelForCausalLM.from_config(MODELS[name])
    return lm


def trainer_plain(case: Case) -> Step:
    """The plain LM as Hugging Face's Trainer has it: eager, all logits, fused AdamW."""
    lm = make_lm(case.model).train()
    batch = make_batch(case)

    def loss() -> Tensor:
        return lm(batch.input_ids, labels=batch.input_ids, shift_labels=batch.labels, use_cache=False).loss

    return _eager_step(case, loss, list(lm.parameters()))


def eager_joint(case: Case) -> Step:
    """The method in eager PyTorch as well as it goes: planned once a sentence, one projection, a gather a layer."""
    lm, planner, codebook, adapter = _joint_parts(case)
    plans: list[Tensor] = []
    batch = make_batch(case)
    ids = batch.segment_ids.flatten()
    widths = _condition(lm, lambda layer: plans[layer].index_select(0, ids))

    def loss() -> Tensor:
        states = planner(batch.sentence_embeddings)[batch.segment_rows[:, 0], batch.segment_rows[:, 1]]
        plan = adapter(planner.head(states).softmax(dim=-1).to(states.dtype) @ codebook)  # [S, D]
        plans[:] = plan.split(widths, dim=1)
        return lm(batch.input_ids, labels=batch.input_ids, shift_labels=batch.labels, use_cache=False).loss

    return _eager_step(case, loss, _trained(case, lm, planner, codebook, adapter))


def authors_joint(case: Case) -> Step:
    """The method as its authors compute it, with their sizes, in the case's dtype (they train in float32).

    In every step a sentence encoder (MPNet-base; here BERT-base, of the same size) encodes anew the sentences in each
    sentence's context, whole ones of the 128 tokens before it. A planner of one layer reads each context and pools it,
    its scores are gathered for every token, and each layer takes softmax, mixture with a codebook of its own and
    projection again.
    """
    lm = make_lm(case.model).train()
    lm.requires_grad_(case.lm == "full")
    encoder = BertModel(BertConfig()).eval()
    size, per_context = encoder.config.hidden_size, AUTHORS_CONTEXT // SENTENCE
    inward, head = nn.Linear(size, size), nn.Linear(size, NUM_ACTIONS)
    layer = nn.TransformerEncoderLayer(size, nhead=2, dropout=0.0, batch_first=True)
    batch = make_batch(case)
    ids = batch.segment_ids.flatten()
    scores: list[Tensor] = []
    parts: list[tuple[nn.Parameter, nn.Linear]] = []

    def plan_of(number: int) -> Tensor:
        codebook, projection = parts[number]
        planned: Tensor = projection((scores[0] / 1.0).softmax(dim=-1).to(codebook.dtype) @ codebook)  # [T, d]
        return planned

    for width in _condition(lm, plan_of):
        codebook = nn.Parameter(torch.randn(NUM_ACTIONS, size) * size**-0.5)
        parts.append((codebook, nn.Linear(size, width)))
    # Of all sentences, those that a row begins with included: what stands before them is stored.
    contexts = torch.randint(
        encoder.config.vocab_size,
        (len(batch.actions) * per_context, SENTENCE + 2),  # with the encoder's first and last token
        generator=torch.Generator().manual_seed(1),
    )
    positions = torch.randn(per_context, size)

    def loss() -> Tensor:
        with torch.no_grad():
            states = [encoder(some).last_hidden_state.mean(dim=1) for some in contexts.split(AUTHORS_BATCH)]
        embeddings = F.normalize(torch.cat(states).float(), dim=-1).view(-1, per_context, size)  # [S, n, A]
        planned = layer(inward(embeddings + positions)).mean(dim=1)  # [S, A]
        scores[:] = [head(planned).index_select(0, ids)]  # [T, K]
        return lm(batch.input_ids, labels=batch.input_ids, shift_labels=batch.labels, use_cache=False).loss

    own = nn.ModuleList([inward, head, layer, *(projection for _, projection in parts)])
    parameters = [*own.parameters(), *(codebook for codebook, _ in parts)]
    return _eager_step(case, loss, [*parameters, *lm.parameters()] if case.lm == "full" else parameters)


def planlm_plain(case: Case) -> Step:
    """`planlm train --selection none`."""
    return _planlm(case, "none")


def planlm_joint(case: Case) -> Step:
    """`planlm train`, planner and codebook training."""
    return _planlm(case, "soft")


PLAIN = ("trainer plain", "planlm plain")
"""Of a frozen LM these train nothing, and are left out."""

PROVIDERS: dict[str, Callable[[Case], Step]] = {
    "trainer plain": trainer_plain,
    "eager joint": eager_joint,
    "authors joint": authors_joint,
    "planlm plain": planlm_plain,
    "planlm joint": planlm_joint,
}


def _planlm(case: Case, selection: str) -> Step:
    torch.manual_seed(0)
    lm = make_lm(case.model)
    config = PlanLMConfig(
        text_config=lm.config,
        attn_implementation=lm.config._attn_implementation,
        num_actions=NUM_ACTIONS,
        action_dim=ACTION_DIM,
        planner_layers=2,
        planner_heads=6,
        planner_dropout=0.0,
        codebook_fingerprint="",
        conditioned_layers=lm.config.num_hidden_layers - 2,
        selection=selection,
    )
    model = PlanLMForCausalLM(config, lm=lm)
    nn.init.normal_(model.codebook, std=ACTION_DIM**-0.5)
    train = TrainConfig(
        corpus="", out="", selection=selection, lm_mode=case.lm, unfreeze_planner_at=0.0, precision=case.precision
    )
    groups = trainable_groups(model, train, steps=1)
    parallel = Parallel(model)
    objective = Objective(parallel, train, steps=1, ratios=(0.0, 0.0))
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
    batch = make_batch(case)
    task = Task(parallel, groups, loader=None, accumulate=1, steps=1, backward=objective.backward)  # type: ignore[arg-type]
    optimizer = make_optimizer(groups, 0.0)
    return lambda: update(task, optimizer, 0, [batch], train).figures["loss"]


def _joint_parts(case: Case) -> tuple[PreTrainedModel, Planner, nn.Parameter, nn.Linear]:
    """LM, planner, codebook and adapter, what trains with gradients on."""
    lm = make_lm(case.model).train()
    lm.requires_grad_(case.lm == "full")
    planner = Planner(ACTION_DIM, NUM_ACTIONS, layers=2, heads=6, dropout=0.0)
    codebook = nn.Parameter(torch.randn(NUM_ACTIONS, ACTION_DIM) * ACTION_DIM**-0.5)
    adapter = nn.Linear(ACTION_DIM, sum(map(input_width, output_projections(lm)[2:])))
    return lm, planner, codebook, adapter


def _condition(lm: PreTrainedModel, plan_of: Callable[[int], Tensor]) -> list[int]:
    """Add `plan_of(layer)`, `[T, d]`, to what enters each conditioned layer's projection; returns the widths."""
    conditioned = output_projections(lm)[2:]
    for layer, projection in enumerate(conditioned):

        def add(_: nn.Module, inputs: tuple[Tensor, ...], layer: int = layer) -> tuple[Tensor, ...]:
            return (inputs[0] + plan_of(layer).view_as(inputs[0]), *inputs[1:])

        projection.register_forward_pre_hook(add)
    return [input_width(projection) for projection in conditioned]


def _trained(
    case: Case, lm: nn.Module, planner: nn.Module, codebook: nn.Parameter, adapter: nn.Module
) -> list[nn.Parameter]:
    own = [*planner.parameters(), codebook, *adapter.parameters()]
    return [*own, *lm.parameters()] if case.lm == "full" else own


def _eager_step(case: Case, loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> Step:
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> float:
        with autocast(case.precision, torch.device("cpu")):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step
