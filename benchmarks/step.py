"""`python -m benchmarks.step`: a training step of PlanLM, plain and joint, against eager PyTorch and the authors.

A step is forward, backward, clipping of the gradients' norm and the optimiser's update, of one LM on the same batch.
Weights are random: they do not change how long anything takes.

Sizes: B sequences, W positions, S sentences, K = 1024 actions, A = 384 (MiniLM), D the conditioned layers'
stacked widths.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    LlamaConfig,
    OlmoConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from benchmarks import harness
from planlm.config import TrainConfig
from planlm.corpus.batches import PlanBatch
from planlm.corpus.layout import Layout
from planlm.corpus.offsets import ALIKE, document_offsets, few_sizes, segment_bounds
from planlm.model.configuration import PlanLMConfig
from planlm.model.families import input_width, output_projections
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.planner import Planner
from planlm.plan_inputs import PlanInputs
from planlm.precision import autocast, matrix_product_rate
from planlm.progress import process_memory
from planlm.report.tables import align
from planlm.training.flops import lm_flops
from planlm.training.groups import make_optimizer, trainable_groups
from planlm.training.loop import Task, update
from planlm.training.objective import Objective
from planlm.training.parallel import Parallel

WINDOWS = {"128x32": (128, 32), "1024x4": (1024, 4)}
"""W and B."""

NUM_ACTIONS, ACTION_DIM, SENTENCE = 1024, 384, 21
"""K, A, and tokens of a sentence: the mean of English Wikipedia's in GPT-2's tokens."""

AUTHORS_CONTEXT, AUTHORS_BATCH = 128, 256
"""Tokens that the authors' planner sees before a sentence, and sentences that they encode at a time."""

MODELS: dict[str, PretrainedConfig] = {
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
    "olmo-1b": OlmoConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
}
"""GPT-2-small without dropout, as `planlm train` has it by default; SmolLM2-135M; OLMo-1B."""

ON_A_CPU = ("gpt2", "smollm2")
"""Models whose steps are measured on a CPU, by default."""

Step = Callable[[], object]
"""One training step; returns the loss, on a GPU a tensor there, for which nobody has waited."""


@dataclass(frozen=True)
class Case:
    """What is measured."""

    model: str  # key of MODELS
    window: int  # W
    batch_size: int  # B
    dtype: str  # "float32", or "bf16": autocast over float32 weights
    lm: str  # "full" or "freeze"
    device: str = "cpu"
    documents: int = 1  # side by side in each sequence

    @property
    def precision(self) -> str:
        """As `--precision` has it."""
        return "bf16" if self.dtype == "bf16" else "fp32"

    def __str__(self) -> str:
        return f"{self.model} {self.window} × {self.batch_size} {self.dtype} {self.lm}"


@dataclass(frozen=True, kw_only=True)
class StepRow(harness.Row):
    """One provider's step of a case; `memory` is beyond what the process had before it built the model."""

    model: str
    window: int
    batch_size: int
    lm: str
    documents: int = 1
    rate: float  # FLOP/s of large matrix products on this machine

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the batch that a second of the median step takes."""
        return self.window * self.batch_size / self.median

    @property
    def utilisation(self) -> float:
        """Share of the matrix-product rate that the LM's FLOPs reach (MFU)."""
        return self.flops / self.median / self.rate


def make_batch(case: Case, alike: bool = False) -> PlanBatch:
    """Sequences of as many documents each, without padding; `alike` as `PlanLoader` has it."""
    random = torch.Generator().manual_seed(0)
    vocabulary, shape = MODELS[case.model].vocab_size, (case.batch_size, case.window)
    sentences = -(-case.window // SENTENCE)  # of a sequence
    count = case.batch_size * sentences
    within = (torch.arange(case.window) // SENTENCE).expand(shape)
    sequences = torch.arange(case.batch_size)
    positions = (torch.arange(case.window) % -(-case.window // case.documents)).expand(shape)
    cu_seqlens, longest = document_offsets((positions == 0).numpy())
    segment_ids = within + sentences * sequences[:, None]
    layout = Layout(np.full(case.batch_size, sentences), most=sentences if alike else 0)
    padding = few_sizes(count, ALIKE) - count if alike else 0
    embeddings = torch.randn(*layout.shape, ACTION_DIM, generator=random)
    at = (layout.begins[:, None] + np.arange(sentences)).flatten()
    places = torch.from_numpy(np.stack(np.divmod(at, layout.shape[1]), axis=1))
    of_planner, longest_of_planner = layout.offsets()
    return PlanBatch(
        input_ids=torch.randint(vocabulary, shape, generator=random),
        position_ids=positions,
        labels=torch.randint(vocabulary, shape, generator=random),
        plan=PlanInputs(
            segment_ids=segment_ids,
            segment_rows=F.pad(places, (0, 0, 0, padding)),
            sentence_embeddings=F.normalize(embeddings, dim=-1),
            sentence_positions=layout.positions(),
            actions=F.pad(torch.randint(NUM_ACTIONS, (count,), generator=random), (0, padding), value=-1),
            segment_bounds=segment_bounds(segment_ids.numpy(), count + padding),
            sentence_cu_seqlens=of_planner,
            sentence_longest=longest_of_planner,
        ),
        documents=sequences[:, None].expand(shape),
        cu_seqlens=cu_seqlens,
        longest=longest,
    ).to(case.device)


def make_lm(case: Case) -> PreTrainedModel:
    """The case's LM with random weights, frozen where it is."""
    torch.manual_seed(0)
    with torch.device(case.device):
        lm: PreTrainedModel = AutoModelForCausalLM.from_config(MODELS[case.model])
    return lm.train().requires_grad_(case.lm == "full")


def trainer_plain(case: Case) -> Step:
    """The plain LM as Hugging Face's Trainer has it: eager, all logits, fused AdamW."""
    lm, batch = make_lm(case), make_batch(case)
    return _eager_step(case, lambda: _lm_loss(lm, batch), lm.parameters())


def eager_joint(case: Case) -> Step:
    """The method in eager PyTorch as well as it goes: planned once a sentence, one projection, a gather a layer."""
    lm, batch = make_lm(case), make_batch(case)
    plans: list[Tensor] = []
    ids = batch.plan.segment_ids.flatten()
    widths = _condition(lm, lambda layer: plans[layer].index_select(0, ids))
    with torch.device(case.device):
        planner = Planner(ACTION_DIM, NUM_ACTIONS, layers=2, heads=6, dropout=0.0)
        codebook = nn.Parameter(torch.randn(NUM_ACTIONS, ACTION_DIM) * ACTION_DIM**-0.5)
        adapter = nn.Linear(ACTION_DIM, sum(widths))

    def loss() -> Tensor:
        sentence_positions = batch.plan.sentence_positions if case.documents > 1 else None
        states = planner(batch.plan.sentence_embeddings, sentence_positions)[batch.plan.segment_rows.unbind(1)]
        plan = adapter(planner.head(states).softmax(dim=-1).to(states.dtype) @ codebook)  # [S, D]
        plans[:] = plan.split(widths, dim=1)
        return _lm_loss(lm, batch)

    return _eager_step(case, loss, [*planner.parameters(), codebook, *adapter.parameters(), *lm.parameters()])


def authors_joint(case: Case) -> Step:
    """The method as its authors compute it, with their sizes, in the case's dtype (they train in float32).

    In every step a sentence encoder (MPNet-base; here BERT-base, of the same size) encodes anew the sentences in each
    sentence's context, whole ones of the 128 tokens before it. A planner of one layer reads each context and pools it,
    its scores are gathered for every token, and each layer takes softmax, mixture with a codebook of its own and
    projection again.
    """
    lm, batch = make_lm(case), make_batch(case)
    encoder = BertModel(BertConfig()).eval()
    size, per_context = encoder.config.hidden_size, AUTHORS_CONTEXT // SENTENCE
    inward, head = nn.Linear(size, size), nn.Linear(size, NUM_ACTIONS)
    layer = nn.TransformerEncoderLayer(size, nhead=2, dropout=0.0, batch_first=True)
    ids = batch.plan.segment_ids.flatten()
    scores: list[Tensor] = []
    codebooks, projections = nn.ParameterList(), nn.ModuleList()

    def plan_of(number: int) -> Tensor:
        probabilities = (scores[0] / 1.0).softmax(dim=-1)  # [T, K]
        planned: Tensor = projections[number](probabilities.to(codebooks[number].dtype) @ codebooks[number])  # [T, d]
        return planned

    for width in _condition(lm, plan_of):
        codebooks.append(nn.Parameter(torch.randn(NUM_ACTIONS, size) * size**-0.5))
        projections.append(nn.Linear(size, width))
    # Of all sentences, those that a sequence begins with included: what stands before them is stored.
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
        return _lm_loss(lm, batch)

    trained = nn.ModuleList([inward, head, layer, projections, codebooks, lm])
    return _eager_step(case, loss, trained.parameters())


def planlm_plain(case: Case) -> Step:
    """`planlm train --selection none`."""
    return _planlm(case, "none")


def planlm_joint(case: Case) -> Step:
    """`planlm train`, planner and codebook training."""
    return _planlm(case, "soft")


def graph_plain(case: Case) -> Step:
    """`planlm_plain` with CUDA graphs, as is the default on CUDA."""
    return _planlm(case, "none", graph=True)


def graph_joint(case: Case) -> Step:
    """`planlm_joint` with CUDA graphs, as is the default on CUDA."""
    return _planlm(case, "soft", graph=True)


def compiled_joint(case: Case) -> Step:
    """`graph_joint` with `--compile`."""
    return _planlm(case, "soft", graph=True, compiled=True)


PLAIN = ("trainer plain", "planlm plain")
"""Of a frozen LM these train nothing, and are left out."""

PROVIDERS: dict[str, Callable[[Case], Step]] = {
    "trainer plain": trainer_plain,
    "eager joint": eager_joint,
    "authors joint": authors_joint,
    "planlm plain": planlm_plain,
    "planlm joint": planlm_joint,
}


def joint_model(lm: PreTrainedModel, selection: str) -> PlanLMForCausalLM:
    """The joint model that is measured: all of an LM's layers but two conditioned, a planner of two layers."""
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
    return PlanLMForCausalLM(config, lm=lm)


def _planlm(case: Case, selection: str, graph: bool = False, compiled: bool = False) -> Step:
    lm = make_lm(case)
    with torch.device(case.device):
        model = joint_model(lm, selection)
    if compiled:
        model.compile_lm()
    nn.init.normal_(model.codebook, std=ACTION_DIM**-0.5)
    train = TrainConfig(
        corpus="", out="", selection=selection, lm_mode=case.lm, unfreeze_planner_at=0.0, precision=case.precision
    )
    groups = trainable_groups(model, train, steps=1)
    parallel = Parallel(model)
    objective = Objective(parallel, train, steps=1, graphs=graph)
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
    batch = make_batch(case, alike=graph)
    task = Task(
        model=parallel,
        groups=groups,
        loader=None,  # type: ignore[arg-type]
        accumulate=1,
        steps=1,
        backward=objective.backward,
        keeps_gradients=graph,
    )
    optimizer = make_optimizer(groups, 0.0)
    return lambda: update(task, optimizer, 0, [batch], train)[0]["loss"]


def _condition(lm: PreTrainedModel, plan_of: Callable[[int], Tensor]) -> list[int]:
    """Add `plan_of(layer)`, `[T, d]`, to what enters each conditioned layer's projection; returns the widths."""
    conditioned = output_projections(lm)[2:]
    for layer, projection in enumerate(conditioned):

        def add(_: nn.Module, inputs: tuple[Tensor, ...], layer: int = layer) -> tuple[Tensor, ...]:
            return (inputs[0] + plan_of(layer).view_as(inputs[0]), *inputs[1:])

        projection.register_forward_pre_hook(add)
    return [input_width(projection) for projection in conditioned]


def _lm_loss(lm: PreTrainedModel, batch: PlanBatch) -> Tensor:
    """transformers', which finds documents in a sequence by their positions and sees them through a mask."""
    positions = batch.position_ids if len(batch.cu_seqlens) > 1 + len(batch.input_ids) else None  # type: ignore[arg-type]
    loss: Tensor = lm(
        batch.input_ids, position_ids=positions, labels=batch.input_ids, shift_labels=batch.labels, use_cache=False
    ).loss
    return loss


def _eager_step(case: Case, loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter]) -> Step:
    """A step on those of the parameters that are not frozen."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    device = torch.device(case.device)

    def step() -> Tensor:
        with autocast(case.precision, device):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


@harness.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 (bad usage)."""
    parser = harness.parser_of("step", __doc__)
    harness.add_flags(parser, PROVIDERS, repetitions=5)
    harness.add_names(parser, "models", MODELS, default=ON_A_CPU)
    harness.add_names(parser, "windows", WINDOWS)
    harness.add_names(parser, "lm", ("full", "freeze"))
    text = "keep: glibc's malloc keeps freed memory"
    parser.add_argument("--malloc", choices=("default", "keep"), default="default", help=text)
    parser.add_argument("--no-memory", action="store_true", help="leave out the runs that measure peak memory")
    options = parser.parse_args(arguments)
    if options.malloc == "keep":
        harness.keep_memory()
    rows: list[StepRow] = []
    for model, window, dtype, lm in itertools.product(options.models, options.windows, options.dtypes, options.lm):
        case = Case(model, *WINDOWS[window], dtype, lm)
        measured = _measure(case, [name for name in options.providers if lm == "full" or name not in PLAIN], options)
        print(_table(case, measured), flush=True)
        rows += measured
        if options.out:
            harness.write_rows(options.out, rows)
    return 0


def _measure(case: Case, names: Sequence[str], options: argparse.Namespace) -> list[StepRow]:
    """Times interleaved in this process, then peak memory of each provider in a process of its own."""
    budget = harness.Budget(options.repetitions, seconds=600.0)
    rate = matrix_product_rate(harness.DTYPES[case.dtype], harness.CPU)
    num_tokens, full = case.window * case.batch_size, case.lm == "full"
    flops = lm_flops(make_lm(case), num_tokens, case.window, trained=full, first_layer=0 if full else 2)
    harness.note(f"{case}: {flops / 1e12:.2f} TFLOP at {rate / 1e9:,.0f} GFLOP/s; timing {', '.join(names)}")
    steps = {name: PROVIDERS[name](case) for name in names}
    times = harness.interleaved(steps, harness.CPU, budget, warm_up=2)
    rate = max(rate, matrix_product_rate(harness.DTYPES[case.dtype], harness.CPU))
    del steps
    common = vars(case) | harness.provenance(harness.CPU) | {"malloc": options.malloc, "flops": flops, "rate": rate}
    rows = []
    for name in names:
        memory = None if options.no_memory else harness.in_new_process(_peak_memory, case, name, options.malloc)
        rows.append(StepRow(provider=name, memory=memory, **common, **harness.timing(times, name)))
    return rows


def _peak_memory(case: Case, name: str, malloc: str) -> int | None:
    """`StepRow.memory`, in a fresh process."""
    if malloc == "keep":
        harness.keep_memory()
    before = process_memory("VmRSS")
    step = PROVIDERS[name](case)
    for _ in range(3):
        step()
    peak = process_memory("VmHWM")
    return None if peak is None or before is None else peak - before


def _table(case: Case, rows: Sequence[StepRow]) -> str:
    cells: list[Sequence[str]] = [("provider", "seconds", "p20", "p80", "tokens/s", "MFU", "GB", "over others")]
    for row in rows:
        times = (f"{seconds:.3f}" for seconds in (row.median, row.p20, row.p80))
        share, memory = f"{100 * row.utilisation:.1f} %", "–" if row.memory is None else f"{row.memory / 1e9:.2f}"
        over = ", ".join(f"{ratio['median']:.3f} {other}" for other, ratio in row.over.items())
        cells.append((row.provider, *times, f"{row.tokens_per_second:,.0f}", share, memory, over))
    title = f"{case}: {rows[0].flops / 1e12:.2f} TFLOP, {rows[0].rate / 1e9:,.0f} GFLOP/s"
    return f"{title}\n{align(cells, left=(0, 7))}\n"


if __name__ == "__main__":
    sys.exit(main())
