"""A planning toy task: paths in a tree as sentences, where looking ahead is all that helps.

A document is a problem and its solution, "Reach N17 from N3 . Then N5 . Next N9 . ... Go N17 . Arrived .", on one
tree that all documents share: the path is unique, its next node is the neighbour of the present one on the goal's side.
The LM attends to three tokens in one layer, so where it predicts a node it sees the present node and not the goal, and
alone can only guess among the neighbours. The planner reads all sentences, so it can know the way, a table that its
weights have to learn. Its actions are coarse on purpose: they tell a sentence's kind and wording and nothing of its
nodes. What it is pre-trained on is therefore of no use to the next node, and frozen it leaves the LM guessing; trained
by the LM's loss it can learn to say the way through the mixture of the same few actions.

Embeddings are made, not encoded: one entry per wording, goal and present node. Held out are pairs of start and goal.

    python -m planlm.experiments.paths --out DIR [--seeds 3]
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from planlm.config import PlannerConfig, TrainConfig
from planlm.corpus.batches import PlanLoader
from planlm.corpus.codebook import assign_actions
from planlm.corpus.store import CorpusWriter, Manifest, PreparedCorpus
from planlm.files import write_json
from planlm.model.loading import load_model
from planlm.pretrained.tokenizer import load_tokenizer, tokenizer_fingerprint
from planlm.text.alignment import tokenize
from planlm.training.pretrain_planner import pretrain_planner
from planlm.training.train import train

END = "<end>"
STARTS, STEPS, ARRIVALS = ("Reach", "Seek"), ("Then", "Next", "Go", "Take", "Now", "On"), ("Arrived", "Done")
WORDINGS = (*STARTS, *STEPS, *ARRIVALS)
"""First words of sentences: each is an action."""

MOST_NEIGHBOURS = 5
"""Of a node of the tree."""

WINDOW = 64
"""Tokens of a sequence, which is longer than any document."""

ATTENTION_WINDOW = 3
"""The present node, the full stop behind it, and the wording of the sentence whose node is predicted."""

ROWS: dict[str, dict[str, Any]] = {
    "none": {"selection": "none"},
    "hard, two-stage": {"selection": "hard"},
    "soft, frozen planner": {"selection": "soft", "freeze_planner": True},
    "straight-through": {"selection": "straight-through"},
    "gumbel": {"selection": "gumbel"},
    "soft, joint": {"selection": "soft"},
    "oracle": {"selection": "oracle"},
}


@dataclass(frozen=True)
class Paths:
    """Sizes and settings of the task.

    Attributes:
        nodes: of the tree.
        shortest: steps of the shortest path asked for.
        documents: of each split.
        node_weight: entry of a node in an embedding, where that of a wording is 1, before both are scaled.
        planner: what pre-training of the planner is told.
        training: what every row's training is told.
    """

    nodes: int = 22
    shortest: int = 3
    documents: dict[str, int] = field(default_factory=lambda: {"train": 2000, "validation": 200, "test": 400})
    node_weight: float = 1.0
    planner: dict[str, Any] = field(
        default_factory=lambda: {"layers": 1, "heads": 4, "dropout": 0.0, "epochs": 2.0, "lr": 3e-3}
    )
    training: dict[str, Any] = field(
        default_factory=lambda: {
            "steps": 500, "batch_size": 16, "lr": 3e-2, "planner_lr": 3e-3, "lm_lr": 3e-3, "codebook_lr": 1e-2,
            "unfreeze_planner_at": 0.0,
        }
    )  # fmt: skip


def tree(num_nodes: int, seed: int) -> dict[int, list[int]]:
    """Neighbours of each node of a tree, five where there are that many below; the seed decides which node is where."""
    names = np.random.default_rng([seed, 0]).permutation(num_nodes).tolist()
    neighbours: dict[int, list[int]] = {name: [] for name in names}
    inner = 0
    for name in names[1:]:
        if len(neighbours[names[inner]]) == MOST_NEIGHBOURS:
            inner += 1
        neighbours[names[inner]].append(name)
        neighbours[name].append(names[inner])
    return neighbours


def path(neighbours: dict[int, list[int]], start: int, goal: int) -> list[int]:
    """The nodes from `start` to `goal`, both included, of a tree."""
    before = {goal: goal}
    found = [goal]
    for node in found:
        for near in neighbours[node]:
            if near not in before:
                before[near] = node
                found.append(near)
    nodes = [start]
    while nodes[-1] != goal:
        nodes.append(before[nodes[-1]])
    return nodes


def split_paths(task: Paths, seed: int) -> dict[str, list[list[int]]]:
    """Paths of each split, every one of its own: 70, 10 and 20 % of all pairs of start and goal."""
    neighbours = tree(task.nodes, seed)
    pairs = [(start, goal) for start in neighbours for goal in neighbours]
    paths = [found for pair in pairs if len(found := path(neighbours, *pair)) > task.shortest]
    order = np.random.default_rng([seed, 1]).permutation(len(paths))
    ends = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
    return {
        name: [paths[i] for i in order[round(first * len(order)) : round(last * len(order))]]
        for name, (first, last) in ends.items()
    }


@dataclass(frozen=True)
class Sentence:
    """A sentence: its first word, the node that it reaches or starts from, if any, and in the first one the goal."""

    wording: str
    node: int | None = None
    goal: int | None = None

    def __str__(self) -> str:
        nodes = [] if self.node is None else [f"N{self.node}"]
        if self.goal is not None:
            nodes = [f"N{self.goal}", "from", *nodes]
        return " ".join([self.wording, *nodes, "."])


def document(nodes: Sequence[int], random: np.random.Generator) -> list[Sentence]:
    """A path as sentences, with words drawn at random."""
    steps = [Sentence(str(random.choice(STEPS)), node) for node in nodes[1:]]
    start = Sentence(str(random.choice(STARTS)), nodes[0], nodes[-1])
    return [start, *steps, Sentence(str(random.choice(ARRIVALS)))]


def embed(task: Paths, sentences: Sequence[Sentence]) -> np.ndarray:
    """Unit-length embeddings `[n, A]`: an entry for the wording, one for the node, one for the goal."""
    width = -(-(len(WORDINGS) + 2 * task.nodes) // 8) * 8  # for the planner's heads
    rows = np.zeros((len(sentences), width), dtype=np.float32)
    for row, sentence in zip(rows, sentences, strict=True):
        row[WORDINGS.index(sentence.wording)] = 1.0
        if sentence.node is not None:
            row[len(WORDINGS) + sentence.node] = task.node_weight
        if sentence.goal is not None:
            row[len(WORDINGS) + task.nodes + sentence.goal] = task.node_weight
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_lm(folder: Path, task: Paths, seed: int) -> None:
    """An untrained GPT-2 of one layer, and its tokenizer: a token a word."""
    words = [END, ".", "from", *WORDINGS, *(f"N{node}" for node in range(task.nodes))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(folder)
    torch.manual_seed(seed)
    shape = GPT2Config(
        vocab_size=len(words), n_positions=128, n_embd=64, n_layer=1, n_head=4, initializer_range=0.1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(shape).save_pretrained(folder)


def write_corpus(folder: Path, lm: Path, task: Paths, seed: int) -> PreparedCorpus:
    """Documents of all splits as a prepared corpus in the tokens of `lm`; an action is a wording, with its mean."""
    random = np.random.default_rng([seed, 2])
    documents = {
        name: [document(paths[random.integers(len(paths))], random) for _ in range(task.documents[name])]
        for name, paths in split_paths(task, seed).items()
    }
    sentences = [sentence for each in documents["train"] for sentence in each]
    embeddings = embed(task, sentences)
    wordings = np.array([WORDINGS.index(sentence.wording) for sentence in sentences])
    codebook = np.stack([embeddings[wordings == action].mean(axis=0) for action in range(len(WORDINGS))])
    tokenizer = load_tokenizer(str(lm))
    writer = CorpusWriter(folder, codebook)
    for name, split in documents.items():
        rows = [_row(task, tokenizer, f"{name}-{number}", each, codebook) for number, each in enumerate(split)]
        columns = [pa.array([row[field.name] for row in rows], field.type) for field in writer.schema]
        writer.add(name, 0, pa.table(columns, schema=writer.schema))
    writer.finish(
        Manifest(
            num_actions=len(codebook), action_dim=codebook.shape[1], encoder="", tokenizer=str(lm),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer), vocabulary=len(tokenizer), has_start_token=False,
            left_out=0, seed=seed, sources=[], settings={}, versions={},
        )
    )  # fmt: skip
    return PreparedCorpus.load(folder)


def _row(task: Paths, tokenizer: Any, name: str, sentences: Sequence[Sentence], codebook: np.ndarray) -> dict[str, Any]:
    """A document's columns."""
    texts = [str(sentence) for sentence in sentences]
    ends = np.cumsum([len(text) + 1 for text in texts]) - 1
    spans = [(int(end) - len(text), int(end)) for text, end in zip(texts, ends, strict=True)]
    ids, counts = tokenize(tokenizer, " ".join(texts), spans)
    embeddings = embed(task, sentences)
    return {
        "id": name, "text": " ".join(texts), "input_ids": ids.tolist(), "sentence_spans": spans,
        "sentence_tokens": counts.tolist(), "embeddings": embeddings.astype(np.float16).tolist(),
        "actions": assign_actions(embeddings, codebook)[0].tolist(),
    }  # fmt: skip


class Choices:
    """The positions of whole documents at which a step's node comes next and there are several that it could be.

    Args:
        corpus: of `write_corpus`.
        seed: of its tree.
    """

    def __init__(self, corpus: PreparedCorpus, task: Paths, seed: int) -> None:
        ids = load_tokenizer(corpus.manifest.tokenizer).convert_tokens_to_ids
        neighbours = tree(task.nodes, seed)
        self._corpus = corpus
        self._steps = torch.tensor(ids(list(STEPS)))
        self._forks = torch.tensor(ids([f"N{node}" for node, near in neighbours.items() if len(near) > 1]))

    def batches(self, split: str) -> Iterator[tuple[Any, torch.Tensor]]:
        """Batches of a split's documents, and where in each the positions are, bool `[B, W]`."""
        for batch in PlanLoader(self._corpus.split(split), window=WINDOW, batch_size=200, shuffle=False):
            present = batch.input_ids.roll(2, dims=1)  # [B, W]
            yield batch, torch.isin(batch.input_ids, self._steps) & torch.isin(present, self._forks)

    @torch.inference_mode()
    def accuracy(self, run: Path, split: str) -> float:
        """How often the most probable token, given the true ones before it, is the next node of the path."""
        model = load_model(str(run))
        right = total = 0
        for batch, at in self.batches(split):
            found = model(batch.input_ids, plan=batch.plan).logits.argmax(dim=-1)
            right, total = right + int((found == batch.labels)[at].sum()), total + int(at.sum())
        return right / total

    def guessing(self, split: str) -> float:
        """The same of the node that is most frequent in training given what the LM sees: present node and position."""
        seen: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
        for sight, node in self._sights("train"):
            seen[sight][node] += 1
        best = {sight: counts.most_common(1)[0][0] for sight, counts in seen.items()}
        return float(np.mean([best.get(sight) == node for sight, node in self._sights(split)]))

    def _sights(self, split: str) -> Iterator[tuple[tuple[int, int], int]]:
        for batch, at in self.batches(split):
            rows, positions = at.nonzero(as_tuple=True)
            present = batch.input_ids[rows, positions - 2].tolist()
            yield from zip(zip(present, positions.tolist(), strict=True), batch.labels[at].tolist(), strict=True)


def run_seed(out: Path, task: Paths, seed: int, rows: Sequence[str] = tuple(ROWS)) -> dict[str, float]:
    """Make tree, corpus, LM and planner of a seed in the folder `out` and train and measure rows.

    Returns:
        Accuracy on the test split by row, and as "guessing" the best without the goal.
    """
    lm, planner = out / "lm", out / "planner"
    write_lm(lm, task, seed)
    choices = Choices(write_corpus(out / "corpus", lm, task, seed), task, seed)
    common: dict[str, Any] = {"corpus": str(out / "corpus"), "seed": seed}
    pretrain_planner(PlannerConfig(out=str(planner), **common, **task.planner))
    found = {"guessing": choices.guessing("test")}
    for row in rows:
        run = out / row.replace(", ", "-").replace(" ", "-")
        train(
            TrainConfig(
                lm=str(lm), planner=str(planner), out=str(run), lm_mode="full", window=WINDOW, precision="fp32",
                attention_window=ATTENTION_WINDOW, **common, **task.training, **ROWS[row],
            )
        )  # fmt: skip
        found[row] = choices.accuracy(run, "test")
    return found


def format_table(results: Sequence[dict[str, float]]) -> str:
    """Accuracies of all seeds as Markdown: mean, least and greatest, in per cent."""
    lines = ["| row | next node right, mean | least to greatest |", "|---|---|---|"]
    for row in results[0]:
        values = [100 * result[row] for result in results]
        lines.append(f"| {row} | {np.mean(values):.1f} % | {min(values):.1f} to {max(values):.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Train all rows on some seeds; write `paths.json` and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; new or empty")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, each with a tree of its own")
    options = parser.parse_args()
    task = Paths()
    results = [run_seed(options.out / f"seed-{seed}", task, seed) for seed in range(options.seeds)]
    write_json(options.out / "paths.json", {"task": asdict(task), "seeds": results})
    print(format_table(results))


if __name__ == "__main__":
    main()
