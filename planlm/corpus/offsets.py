"""Where what a batch holds side by side begins: offsets that CUDA kernels take, made where it is known, on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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
