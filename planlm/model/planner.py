"""The planner: a causal transformer over sentence embeddings that predicts the next sentence's action.

One pass over a document's sentence embeddings gives the prediction for every sentence. A position stands for a
sentence and is given the embedding of the one before it, the first a learned start vector: the state there has seen
`x_{<i}` and nothing else (docs/method.md, "Which plan reaches which token"). Documents of any length are packed into a
sequence, as windows are for the LM: padded to the longest of a batch, most positions would be padding.

Sizes: R sequences of n positions, A = width, H heads.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from planlm.errors import InputError
from planlm.files import share
from planlm.kernels import Documents, packed_attention, varlen_attention, varlen_documents
from planlm.model.configuration import COUNT, DROPOUT, OPTIONAL_COUNT, TEXT, Rule, check_values
from planlm.pretrained.weights import check_finite, check_packed, read_header

_RULES: dict[str, Rule] = {
    "action_dim": COUNT,
    "num_actions": COUNT,
    "layers": COUNT,
    "heads": COUNT,
    "dropout": DROPOUT,
    "codebook_fingerprint": TEXT,
    "context": OPTIONAL_COUNT,
    "horizon": COUNT,
}


def sinusoidal_positions(length: int, width: int, device: torch.device) -> Tensor:
    """Fixed position codes `[length, width]` (Vaswani et al. 2017, section 3.5); they bound no document's length."""
    position = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    half = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    angle = position * torch.exp(half * (-math.log(10000.0) / width))  # [length, ceil(width / 2)]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width]


class PlannerLayer(nn.Module):
    """A transformer layer with layer norms first, whose attention stays within documents.

    Args:
        width: A.
        heads: H.
        dropout: behind both halves and within the feed-forward one.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, first: Tensor, documents: Documents | None = None, window: int | None = None
    ) -> Tensor:
        """`[R, n, A]` to the same; `first` `[R, n]` is the first position that each position sees.

        With `documents`, by torch's kernel for them, `first` is not looked at, but each sees the last `window` of its
        document.
        """
        heads = self.inputs(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))  # [R, n, 3, H, A / H]
        query, key, value = heads.unbind(2)
        scale = query.shape[-1] ** -0.5
        if documents is None:
            mixed = packed_attention(query, key, value, first, scale)
        else:
            mixed = varlen_attention(query, key, value, documents, scale, window)
        x = x + self.dropout(self.output(mixed.flatten(2)))
        out: Tensor = x + self.feed_forward(x)
        return out


def codebook_fingerprint(codebook: Tensor) -> str:
    """sha256 of a codebook `[K, A]`: planners and models remember which actions they were trained on."""
    return hashlib.sha256(codebook.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


class Planner(nn.Module):
    """Causal transformer over sentence embeddings; width and head follow the codebook.

    Args:
        action_dim: dimension A of a sentence embedding, also the width.
        num_actions: number of actions K.
        layers: transformer layers.
        heads: attention heads.
        dropout: dropout within the layers.
        codebook_fingerprint: of the codebook whose actions it predicts; stored with it.
        context: sentences that it sees, the last ones; None: all of the document so far.
        horizon: number of next actions that it predicts: the next sentence's by `head`, those of the ones after it by
            `ahead`, from the same state.

    Raises:
        InputError: `heads` do not divide the width.
    """

    def __init__(
        self,
        action_dim: int,
        num_actions: int,
        layers: int = 2,
        heads: int = 6,
        dropout: float = 0.1,
        codebook_fingerprint: str = "",
        context: int | None = None,
        horizon: int = 1,
    ) -> None:
        super().__init__()
        if action_dim % heads:
            raise InputError(
                f"planner heads: {heads} do not divide the embedding dimension {action_dim}; set a divisor"
            )
        self.settings: dict[str, Any] = {
            "action_dim": action_dim,
            "num_actions": num_actions,
            "layers": layers,
            "heads": heads,
            "dropout": dropout,
            "codebook_fingerprint": codebook_fingerprint,
            "context": context,
            "horizon": horizon,
        }
        self.start = nn.Parameter(torch.randn(action_dim) * action_dim**-0.5)
        self.layers = nn.ModuleList(PlannerLayer(action_dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(action_dim)
        self.head = nn.Linear(action_dim, num_actions)
        self.ahead = nn.ModuleList(nn.Linear(action_dim, num_actions) for _ in range(horizon - 1))

    @classmethod
    def of_codebook(
        cls,
        codebook: Tensor,
        layers: int = 2,
        heads: int | None = None,
        dropout: float = 0.1,
        context: int | None = None,
        horizon: int = 1,
    ) -> Planner:
        """An untrained planner of a codebook `[K, A]`, which its heads start as (docs/method.md: `C` begins as `E`).

        By default it has about one attention head per 64 channels, and a divisor of the width.
        """
        num_actions, width = codebook.shape
        heads = heads or next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
        planner = cls(width, num_actions, layers, heads, dropout, codebook_fingerprint(codebook), context, horizon)
        with torch.no_grad():
            for head in (planner.head, *planner.ahead):
                head.weight.copy_(codebook)  # type: ignore[operator, union-attr]
                head.bias.zero_()  # type: ignore[operator, union-attr]
        return planner

    def forward(
        self,
        sentence_embeddings: Tensor,
        sentence_positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        longest: int = 0,
    ) -> Tensor:
        """Planner states of every sentence.

        Args:
            sentence_embeddings: `[R, n, A]`, at each position that of the sentence before; not read at the first.
            sentence_positions: int64 `[R, n]`, the sentence's number within its document, whose positions stand side
                by side; by default a sequence is one document.
            cu_seqlens: int32 `[N + 1]`, where the documents of these positions begin, with `longest` of them what
                `kernels.Documents` holds; without, attention on CUDA takes a mask.

        Returns:
            States `[R, n, A]`; what belongs to a position is a function of the sentences before it in its document
            only, and of the last `context` of them.
        """
        _, length, width = sentence_embeddings.shape
        at = torch.arange(length, device=sentence_embeddings.device)
        positions = at.expand(sentence_embeddings.shape[:2]) if sentence_positions is None else sentence_positions
        x = torch.where((positions == 0)[..., None], self.start, sentence_embeddings.to(self.start.dtype))
        # Sentence embeddings have unit length: at unit variance they stand beside position codes of the same size.
        x = x * width**0.5 + sinusoidal_positions(length, width, x.device).to(x.dtype)[positions]
        first, context = at - positions, self.settings["context"]
        documents = None
        if cu_seqlens is not None:
            given = Documents(cu_seqlens, longest)
            documents = varlen_documents(given, x.device, x.dtype, width // self.settings["heads"])
        for number, layer in enumerate(self.layers):
            seen, window = first, None
            if context is not None:  # layers' reaches add up, to `context` sentences: a position holds the one before
                window = 1 + (context - 1 - number + len(self.layers) - 1) // len(self.layers)
                seen = first.maximum(at - window + 1)
            x = layer(x, seen, documents, window)
        states: Tensor = self.norm(x)
        return states

    def horizon_nll(self, states: Tensor, nll: Tensor, ahead: Tensor) -> Tensor:
        """Cross-entropy of sentences' next actions `[S]`, each a mean over those of its horizon that there are.

        Args:
            states: `[S, A]`.
            nll: `[S]`, cross-entropy of the next action.
            ahead: int64 `[S, horizon - 1]`, the actions after it; negative where the document has ended.
        """
        count = torch.ones_like(nll)
        for head, actions in zip(self.ahead, ahead.unbind(1), strict=True):
            known = actions >= 0
            found = F.cross_entropy(head(states).float(), actions.where(known, 0), reduction="none")
            nll, count = nll + found.where(known, 0.0), count + known
        return nll / count

    def save(self, folder: Path) -> None:
        """Write `planner.json` and `planner.safetensors` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / "planner.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, weights)
        share([weights])
        (folder / "planner.json").write_text(json.dumps(self.settings, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Planner:
        """Read what `save` wrote.

        Raises:
            InputError: no planner in `folder`, or an unreadable one.
        """
        weights = folder / "planner.safetensors"
        for file in (folder / "planner.json", weights):
            if not file.is_file():  # a pipe would be waited for
                raise InputError(
                    f"{folder}: no planner here ({file} is missing); make one with `planlm pretrain-planner`"
                )
        try:
            settings = json.loads((folder / "planner.json").read_text(encoding="utf-8"))
            settings = {"context": None, "horizon": 1} | settings  # which earlier planners did not have
            check_values(settings, _RULES)
            stored = read_header(weights)
            check_packed(str(weights), stored, stored)
            if settings["layers"] + settings["horizon"] > len(stored):
                raise InputError(
                    f"{settings['layers']} layers and {settings['horizon']} heads, and {len(stored)} tensors are stored"
                )
            with torch.device("meta"):  # memory is taken for what is stored, not for what the settings say
                planner = cls(**settings)
            planner.load_state_dict(load_file(weights), assign=True)
            check_finite(str(weights), planner)
        except Exception as error:
            reason = " ".join((str(error) or type(error).__name__).split())
            raise InputError(
                f"{folder}: planner cannot be read ({reason[:300]}); make it again with `planlm pretrain-planner`"
            ) from None
        return planner.float()
