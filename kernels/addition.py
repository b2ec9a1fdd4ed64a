"""Each token's plan added to its LM state: `y[t] = x[t] + gate * plan[segment_ids[t]]`.

The ids are sorted, so the backward with respect to `plan` is a segment sum in a fixed order.

Sizes: T tokens, S sentences, D plan size of one layer.
"""

from __future__ import annotations

from torch import Tensor

from . import fused, reference
from .backend import choose, full_precision
from .checks import check_add_plan, check_segment_ids
from .derivatives import first_derivative_only
from .reference import working_dtype


def add_plan(x: Tensor, plan: Tensor, segment_ids: Tensor, gate: Tensor | None = None) -> Tensor:
    """Add to every token the plan of its segment.

    Computed in float32 for half-precision inputs and rounded once; deterministic, forward and backward, on every
    backend. Differentiable in x, plan and gate, once.

    Args:
        x (Tensor): LM states, `[T, D]`.
        plan (Tensor): one row per segment, `[S, D]`; any strides, so a column slice of a stacked projection will do.
        segment_ids (Tensor): each token's row of `plan`, int64 `[T]`; never falling, apart from -1: that token's state
            is returned bit for bit.
        gate (Tensor | None): multiplies the plan, `[D]`.

    Returns:
        Tensor: `[T, D]`, in x's dtype.

    Raises:
        ValueError: a wrong argument, by name. The values of `segment_ids` are checked on CPU only.
        RuntimeError: a second derivative was asked for.
    """
    check_add_plan(x, plan, segment_ids, gate)
    backend = choose("add_plan", x.device, working_dtype(x, plan, gate))
    if backend is None or backend.name != "cpp":
        check_segment_ids(segment_ids, len(plan))
    if backend is not None:
        return fused.add_plan(backend, x, plan, segment_ids, gate)
    with full_precision(x.device):
        x, plan, gate = first_derivative_only(x), first_derivative_only(plan), first_derivative_only(gate)
        return reference.add_plan(x, plan, segment_ids, gate)
