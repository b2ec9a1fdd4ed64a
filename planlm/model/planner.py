"""The planner: a causal transformer over sentence embeddings that predicts the next sentence's action.

One pass over a document's sentence embeddings gives the prediction for every sentence: row `i` of the output has
seen `x_{<i}` and nothing else, since a learned start vector takes the first place and moves the rest by one
(docs/method.md, "Which action reaches which token").
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from planlm.errors import InputError


def sinusoidal_positions(length: int, width: int, device: torch.device) -> Tensor:
    """Fixed position codes `[length, width]` (Vaswani et al. 2017, section 3.5); they bound no document's length."""
    position = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    half = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    angle = position * torch.exp(half * (-math.log(10000.0) / width))  # [length, ceil(width / 2)]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width]


def default_heads(width: int) -> int:
    """About one attention head per 64 channels, and a divisor of the width."""
    return next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)


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
        }
        self.start = nn.Parameter(torch.randn(action_dim) * action_dim**-0.5)
        layer = nn.TransformerEncoderLayer(
            action_dim, heads, 4 * action_dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(action_dim), enable_nested_tensor=False
        )
        self.head = nn.Linear(action_dim, num_actions)

    @torch.no_grad()
    def initialize_head(self, codebook: Tensor) -> None:
        """Set the head to the codebook `[K, A]` with zero bias (docs/method.md: `C` initialised with `E`)."""
        self.head.weight.copy_(codebook)
        self.head.bias.zero_()

    def forward(self, sentence_embeddings: Tensor) -> Tensor:
        """Planner states of every sentence and of the one after the last.

        Args:
            sentence_embeddings: `[N, n, A]`, documents padded at the end.

        Returns:
            `[N, n + 1, A]`; row `i` is a function of the sentences before `i` only.
        """
        num_documents, num_sentences, width = sentence_embeddings.shape
        start = self.start.expand(num_documents, 1, width)
        x = torch.cat((start, sentence_embeddings.to(start.dtype)), dim=1)  # [N, n + 1, A]
        # Sentence embeddings have unit length: at unit variance they stand beside position codes of the same size.
        x = x * width**0.5 + sinusoidal_positions(num_sentences + 1, width, x.device).to(x.dtype)
        mask = nn.Transformer.generate_square_subsequent_mask(num_sentences + 1, device=x.device, dtype=x.dtype)
        return self.transformer(x, mask=mask, is_causal=True)

    def save(self, folder: Path) -> None:
        """Write `planner.json` and `planner.safetensors` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / "planner.safetensors"
        )
        (folder / "planner.json").write_text(json.dumps(self.settings, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Planner:
        """Read what `save` wrote.

        Raises:
            InputError: no planner in `folder`, or an unreadable one.
        """
        try:
            planner = cls(**json.loads((folder / "planner.json").read_text()))
            planner.load_state_dict(load_file(folder / "planner.safetensors"))
        except FileNotFoundError as error:
            raise InputError(
                f"{folder}: no planner here ({error.filename} is missing); make one with `planlm pretrain-planner`"
            ) from None
        except Exception as error:
            raise InputError(f"{folder}: planner cannot be read: {str(error).splitlines()[0]}") from None
        return planner
