"""What the operations refuse: always with a ValueError that names the argument, what it got and what it needs.

Shapes, dtypes, devices and options are checked always. Values inside tensors (ids in range, sorted, weights within
0 and 1) are checked on CPU only: reading them on another device would make the host wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from .operators import ProjectionInputs
from .reference import NOISY, SELECTIONS

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_logits(logits: Tensor) -> None:
    """Refuse logits that `plan_projection` cannot take."""
    _floating("logits", logits, "[S, K]", (None, None))
    if logits.shape[1] == 0:
        _refuse("logits", "no action (K = 0)", "at least one")


def check_hidden(hidden: Tensor, head: Tensor, head_bias: Tensor | None) -> None:
    """Refuse what `plan_projection_from_hidden` cannot make logits of."""
    _floating("hidden", hidden, "[S, P]", (None, None))
    _floating("head", head, "[K, P]", (None, None), device=hidden.device)
    num_actions = head.shape[0]
    if num_actions == 0:
        _refuse("head", "no action (K = 0)", "at least one")
    _shape("head", head, (num_actions, hidden.shape[1]), "[K, P], with hidden's P")
    if head_bias is not None:
        _floating("head_bias", head_bias, "[K]", (num_actions,), "with head's K", hidden.device)


def check_projection(inputs: ProjectionInputs, selection: str) -> None:
    """Refuse what neither projection can take, with logits or states that have been checked."""
    source, _, _, codebook, weight, bias, noise, _, oracle_weight, temperature, top_k, _ = inputs
    num_sentences, num_actions, device = source.shape[0], inputs.num_actions, source.device
    _floating("codebook", codebook, "[K, A]", (num_actions, None), "with the K of the logits", device)
    _floating("weight", weight, "[D, A]", (None, inputs.size), "with codebook's A", device)
    if bias is not None:
        assert weight is not None
        _floating("bias", bias, "[D]", weight.shape[:1], "with weight's D", device)
    if selection not in SELECTIONS:
        _refuse("selection", repr(selection), f"one of {', '.join(SELECTIONS)}")
    if not isinstance(temperature, Real) or not 0 < temperature < math.inf:  # numpy's numbers too
        _refuse("temperature", repr(temperature), "a finite number above 0")
    if selection != "top-k":
        if top_k is not None:
            _refuse("top_k", f"{top_k!r} with selection {selection!r}", "None, or selection 'top-k'")
    elif not isinstance(top_k, Integral) or not 1 <= top_k <= num_actions:
        _refuse("top_k", repr(top_k), f"a whole number from 1 to {num_actions} (K)")
    if noise is not None:
        if selection not in NOISY:
            _refuse("noise", f"a tensor with selection {selection!r}", f"None, or one of {', '.join(NOISY)}")
        _floating("noise", noise, "[S, K]", (num_sentences, num_actions), "the shape of the logits", device)
    _check_oracle_weight(oracle_weight, num_sentences, device)
    _check_oracle(inputs, selection)


def check_add_plan(x: Tensor, plan: Tensor, segment_ids: Tensor, gate: Tensor | None) -> None:
    """Refuse what `add_plan` cannot take."""
    if gate is None and type(x) is Tensor and type(plan) is Tensor and _fit(x, plan, segment_ids):
        return
    _floating("x", x, "[T, D]", (None, None))
    num_tokens, size = x.shape
    _floating("plan", plan, "[S, D]", (None, size), "with x's D", x.device)
    if gate is not None:
        _floating("gate", gate, "[D]", (size,), "with x's D", x.device)
    _indices("segment_ids", segment_ids, num_tokens, "[T], with x's T", x.device)


def _fit(x: Tensor, plan: Tensor, segment_ids: Tensor) -> bool:
    """What `check_add_plan` looks for in each of them in turn, in a third of the time: it is asked in every layer."""
    num_tokens, size = x.shape if x.ndim == 2 else (-1, -1)
    return (
        plan.shape[1:] == (size,)
        and segment_ids.shape == (num_tokens,)
        and segment_ids.dtype == torch.int64
        and x.dtype in _FLOATING
        and plan.dtype in _FLOATING
        and x.layout == plan.layout == segment_ids.layout == torch.strided
        and x.device == plan.device == segment_ids.device
    )


def check_segment_ids(segment_ids: Tensor, num_sentences: int) -> None:
    """Refuse ids out of range or order, where they can be read. The C++ operator does so itself, at less cost."""
    num_tokens = len(segment_ids)
    if not _readable(segment_ids) or num_tokens == 0:
        return
    lowest, highest = (int(bound) for bound in segment_ids.aminmax())
    if lowest < -1 or highest >= num_sentences:
        _refuse(
            "segment_ids", f"ids from {lowest} to {highest}", f"-1 (no plan) or a row of plan, below {num_sentences}"
        )
    planned = segment_ids[segment_ids >= 0]
    if bool((planned.diff() < 0).any()):
        at = int((planned.diff() < 0).nonzero()[0])
        _refuse(
            "segment_ids",
            f"{planned[at]} before {planned[at + 1]}",
            "ids that never fall, apart from -1",
        )


def _check_oracle_weight(weight: float | Tensor | None, num_sentences: int, device: torch.device) -> None:
    if not isinstance(weight, Tensor):
        if not isinstance(weight, Real) or not 0 <= weight <= 1:
            _refuse("oracle_weight", repr(weight), "a number from 0 to 1, or a tensor of them, [S]")
        return
    _floating("oracle_weight", weight, "[S]", (num_sentences,), "one per sentence, or a number", device)
    if _readable(weight):
        wrong = ((weight >= 0) & (weight <= 1)).logical_not().nonzero()
        if len(wrong) > 0:
            at = int(wrong[0, 0])
            _refuse("oracle_weight", f"{weight[at].item()} in row {at}", "weights from 0 to 1")


def _check_oracle(inputs: ProjectionInputs, selection: str) -> None:
    oracle, weight, num_actions = inputs.oracle, inputs.oracle_weight, inputs.num_actions
    if oracle is None:
        if selection == "oracle":
            _refuse("oracle", "None with selection 'oracle'", "the oracle actions, int64 [S]")
        if isinstance(weight, Tensor) or weight != 0:
            _refuse("oracle", "None with an oracle_weight", "the oracle actions, int64 [S], or oracle_weight=0.0")
        return
    num_sentences = inputs.source.shape[0]
    _indices("oracle", oracle, num_sentences, "[S], one per sentence", inputs.source.device)
    if not _readable(oracle) or num_sentences == 0:
        return
    lowest, highest = (int(bound) for bound in oracle.aminmax())
    if highest >= num_actions:
        _refuse("oracle", f"action {highest}", f"actions below {num_actions} (K); negative means none")
    if selection == "oracle" and lowest < 0:
        _refuse("oracle", f"{lowest} (no action)", "an action in every row with selection 'oracle'")


def _floating(
    name: str, tensor: Any, sizes: str, shape: Sequence[int | None], whose: str = "", device: torch.device | None = None
) -> None:
    """`sizes` and `whose` say in words what `shape` says in numbers; None there: any."""
    _plain(name, tensor, sizes, device)
    if tensor.dtype not in _FLOATING:
        _refuse(name, str(tensor.dtype), "float16, bfloat16, float32 or float64")
    if tensor.dim() != len(shape):
        _refuse(name, f"shape {list(tensor.shape)}", sizes)
    if any(need is not None and have != need for have, need in zip(tensor.shape, shape, strict=True)):
        needed = [have if need is None else need for have, need in zip(tensor.shape, shape, strict=True)]
        _refuse(name, f"shape {list(tensor.shape)}", f"{needed}, that is {sizes}, {whose}")


def _indices(name: str, tensor: Tensor, length: int, wanted: str, device: torch.device) -> None:
    _plain(name, tensor, wanted, device)
    if tensor.dtype != torch.int64:
        _refuse(name, str(tensor.dtype), "torch.int64")
    _shape(name, tensor, (length,), wanted)


def _plain(name: str, tensor: Any, wanted: str, device: torch.device | None) -> None:
    if not isinstance(tensor, Tensor):
        _refuse(name, type(tensor).__name__, f"a tensor, {wanted}")
    # By name: importing DTensor takes a second, and who has one has imported it.
    if type(tensor).__name__ == "DTensor":
        _refuse(
            name, "a DTensor", "a plain tensor: these operations do not shard; pass tensor.to_local() or full_tensor()"
        )
    if tensor.layout != torch.strided:
        _refuse(name, f"layout {tensor.layout}", "a dense tensor: call to_dense()")
    if device is not None and tensor.device != device:
        _refuse(name, f"device {tensor.device}", f"{device}, where the first argument is")


def _shape(name: str, tensor: Tensor, shape: tuple[int, ...], wanted: str) -> None:
    if tuple(tensor.shape) != shape:
        _refuse(name, f"shape {list(tensor.shape)}", f"{list(shape)}, that is {wanted}")


def _readable(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device or breaking a graph that is being compiled."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor).__name__ != "FakeTensor"


def _refuse(argument: str, got: str, needs: str) -> NoReturn:
    raise ValueError(f"{argument}: got {got}, needs {needs}")
