"""Where what a batch holds side by side begins: offsets that CUDA kernels take, made where it is known, on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ALIKE = 1
"""`of_octave` where nearly all batches are to have one shape, for CUDA graphs: powers of two."""


def few_sizes(size: int, of_octave: int = 8) -> int:
    """`size` or up to an eighth more: an even number, one of eight between two powers of two, or of `of_octave`.

    The libraries below compile a kernel for each shape of matrix product that they meet and keep it, oneDNN up to 1,024
    of them and torch's batch-reduce products all. With sizes as they come, training grew by 4 to 10 MB a step.
    """
    step = max(2, 1 << max(0, size.bit_length() - of_octave.bit_length()))
    return -(-size // step) * step


def segment_bounds(segment_ids: np.ndarray, num_segments: int) -> Tensor:
    """int32 `[S + 1]`: positions of segment s, row after row, lie from `bounds[s]` to before `bounds[s + 1]`.

    Positions of no segment lie among them; a segment that no position has gets nothing.

    Args:
        segment_ids: [B, W], sorted over the batch but for -1, none.
        num_segments: S.
    """
    flat = segment_ids.reshape(-1)
    shown = np.flatnonzero(flat >= 0)
    running = np.maximum.accumulate(flat[: shown[-1] + 1] if len(shown) else flat[:0])
    return torch.from_numpy(np.searchsorted(running, np.arange(num_segments + 1)).astype(np.int32))


def document_offsets(begins: np.ndarray, of_octave: int = 8) -> tuple[Tensor, int]:
    """What `kernels.Documents` holds, of rows in which documents stand side by side.

    The number of documents is brought to one of few sizes by empty ones at the end, unless each row is one document:
    so that can be told from the shapes.

    Args:
        begins: bool [R, n], the positions where a document begins, the first of a row or not.
        of_octave: as `few_sizes` has it, of the number of documents.

    Returns:
        (int32 `[N + 1]`, the first position of each document, row after row, and the end of the last; the positions of
        the longest, or more up to the next power of two).
    """
    rows, width = begins.shape
    begins = begins.copy()
    begins[:, :1] = True
    first = np.flatnonzero(begins)
    count = len(first) if len(first) == rows else few_sizes(len(first), of_octave)
    offsets = np.full(1 + count, rows * width, dtype=np.int32)
    offsets[: len(first)] = first
    # Kernels launch blocks for so many positions of each document; those of too many end at once.
    longest = int(np.diff(offsets).max(initial=1))
    return torch.from_numpy(offsets), min(width, 1 << (longest - 1).bit_length())
