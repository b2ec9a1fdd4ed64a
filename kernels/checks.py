"""What the operations refuse: a ValueError that names the argument, what it got and what it needs.

Shapes, dtypes, devices and options are checked always. Values inside tensors (ids in range, sorted, weights within
0 and 1) are checked on CPU only: reading them on another device would make the host wait for it.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import NoReturn, TypedDict, Unpack

import torch
from torch import Tensor

from .reference import NOISY, SELECTIONS

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class PlanOptions(TypedDict):
    """The keyword arguments of `plan_projection`, which documents them."""

    temperature: float
    selection: str
    oracle: Tensor | None
    oracle_weight: float | Tensor
    noise: Tensor | None
    top_k: int | None


def check_plan_projection(
    logits: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    **options: Unpack[PlanOptions],
) -> None:
    """Refuse what `plan_projection` cannot take.

    Raises:
        ValueError: names the argument, what it got and what it needs.
    """
    _floating("logits", logits, "[S, K]", 2)
    num_sentences, num_actions = logits.shape
    if num_actions == 0:
        _refuse("logits", "no action (K = 0)", "at least one")
    _check_projection(codebook, weight, bias, num_actions, logits.device)
    _check_options(options, num_sentences, num_actions, logits.device)


def check_plan_projection_from_hidden(
    hidden: Tensor,
    head: Tensor,
    head_bias: Tensor | None,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    **options: Unpack[PlanOptions],
) -> None:
    """Refuse what `plan_projection_from_hidden` cannot take.

    Raises:
        ValueError: names the argument, what it got and what it needs.
    """
    _floating("hidden", hidden, "[S, P]", 2)
    num_sentences, state_size = hidden.shape
    device = hidden.device
    _floating("head", head, "[K, P]", 2, device)
    num_actions = head.shape[0]
    if num_actions == 0:
        _refuse("head", "no action (K = 0)", "at least one")
    _shape("head", head, (num_actions, state_size), "[K, P], with hidden's P")
    if head_bias is not None:
        _floating("head_bias", head_bias, "[K]", 1, device)
        _shape("head_bias", head_bias, (num_actions,), "[K], with head's K")
    _check_projection(codebook, weight, bias, num_actions, device)
    _check_options(options, num_sentences, num_actions, device)


def check_add_plan(x: Tensor, plan: Tensor, segment_ids: Tensor, gate: Tensor | None) -> None:
    """Refuse what `add_plan` cannot take.

    Raises:
        ValueError: names the argument, what it got and what it needs.
    """
    _floating("x", x, "[T, D]", 2)
    num_tokens, size = x.shape
    _floating("plan", plan, "[S, D]", 2, x.device)
    num_sentences = plan.shape[0]
    _shape("plan", plan, (num_sentences, size), "[S, D], with x's D")
    if gate is not None:
        _floating("gate", gate, "[D]", 1, x.device)
        _shape("gate", gate, (size,), "[D], with x's D")
    _indices("segment_ids", segment_ids, num_tokens, "[T], with x's T", x.device)


def check_segment_ids(segment_ids: Tensor, num_sentences: int) -> None:
    """Refuse ids out of range or order, where they can be read. The C++ operator does so itself, at less cost.

    Raises:
        ValueError: names the argument, what it got and what it needs.
    """
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


def _check_projection(
    codebook: Tensor, weight: Tensor, bias: Tensor | None, num_actions: int, device: torch.device
) -> None:
    _floating("codebook", codebook, "[K, A]", 2, device)
    size = codebook.shape[1]
    _shape("codebook", codebook, (num_actions, size), "[K, A], with the K of the logits")
    _floating("weight", weight, "[D, A]", 2, device)
    plan_size = weight.shape[0]
    _shape("weight", weight, (plan_size, size), "[D, A], with codebook's A")
    if bias is not None:
        _floating("bias", bias, "[D]", 1, device)
        _shape("bias", bias, (plan_size,), "[D], with weight's D")


def _check_options(options: PlanOptions, num_sentences: int, num_actions: int, device: torch.device) -> None:
    selection, temperature = options["selection"], options["temperature"]
    if selection not in SELECTIONS:
        _refuse("selection", repr(selection), f"one of {', '.join(SELECTIONS)}")
    if not isinstance(temperature, Real) or not 0 < temperature < math.inf:  # numpy's numbers too
        _refuse("temperature", repr(temperature), "a finite number above 0")
    _check_top_k(options["top_k"], selection, num_actions)
    noise = options["noise"]
    if noise is not None:
        if selection not in NOISY:
            _refuse("noise", f"a tensor with selection {selection!r}", f"None, or one of {', '.join(NOISY)}")
        _floating("noise", noise, "[S, K]", 2, device)
        _shape("noise", noise, (num_sentences, num_actions), "[S, K], the shape of the logits")
    _check_oracle_weight(options["oracle_weight"], num_sentences, device)
    _check_oracle(options, num_sentences, num_actions, device)


def _check_top_k(top_k: int | None, selection: str, num_actions: int) -> None:
    if selection != "top-k":
        if top_k is not None:
            _refuse("top_k", f"{top_k!r} with selection {selection!r}", "None, or selection 'top-k'")
    elif not isinstance(top_k, Integral) or not 1 <= top_k <= num_actions:
        _refuse("top_k", repr(top_k), f"a whole number from 1 to {num_actions} (K)")


def _check_oracle_weight(share: float | Tensor, num_sentences: int, device: torch.device) -> None:
    if not isinstance(share, Tensor):
        if not isinstance(share, Real) or not 0 <= share <= 1:
            _refuse("oracle_weight", repr(share), "a number from 0 to 1, or a tensor of them, [S]")
        return
    _floating("oracle_weight", share, "[S]", 1, device)
    _shape("oracle_weight", share, (num_sentences,), "[S], one per sentence, or a number")
    if _readable(share):
        wrong = ((share >= 0) & (share <= 1)).logical_not().nonzero()
        if len(wrong) > 0:
            _refuse("oracle_weight", f"{share[wrong[0, 0]].item()} in row {int(wrong[0, 0])}", "weights from 0 to 1")


def _check_oracle(options: PlanOptions, num_sentences: int, num_actions: int, device: torch.device) -> None:
    oracle, share, selection = options["oracle"], options["oracle_weight"], options["selection"]
    if oracle is None:
        if selection == "oracle":
            _refuse("oracle", "None with selection 'oracle'", "the oracle actions, int64 [S]")
        if isinstance(share, Tensor) or share != 0:
            _refuse("oracle", "None with an oracle_weight", "the oracle actions, int64 [S], or oracle_weight=0.0")
        return
    _indices("oracle", oracle, num_sentences, "[S], one per sentence", device)
    if not _readable(oracle) or num_sentences == 0:
        return
    lowest, highest = (int(bound) for bound in oracle.aminmax())
    if highest >= num_actions:
        _refuse("oracle", f"action {highest}", f"actions below {num_actions} (K); negative means none")
    if selection == "oracle" and lowest < 0:
        _refuse("oracle", f"{lowest} (no action)", "an action in every row with selection 'oracle'")


def _floating(name: str, tensor: Tensor, wanted: str, num_dims: int, device: torch.device | None = None) -> None:
    _plain(name, tensor, wanted, device)
    if tensor.dtype not in _FLOATING:
        _refuse(name, str(tensor.dtype), "float16, bfloat16, float32 or float64")
    if tensor.dim() != num_dims:
        _refuse(name, f"shape {list(tensor.shape)}", wanted)


def _indices(name: str, tensor: Tensor, length: int, wanted: str, device: torch.device) -> None:
    _plain(name, tensor, wanted, device)
    if tensor.dtype != torch.int64:
        _refuse(name, str(tensor.dtype), "torch.int64")
    _shape(name, tensor, (length,), wanted)


def _plain(name: str, tensor: Tensor, wanted: str, device: torch.device | None) -> None:
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
