"""The gate before every timing: each provider's outputs and gradients against the block in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.block import Block, Provider, forward_backward, strong_eager
from benchmarks.harness import WrongResultError

FLOAT32_TOLERANCE = {"planlm": 1e-5}
"""Largest relative error in float32; 1e-4 for the others, which may compute in any order."""

BF16_TOLERANCE = 5e-2
"""Largest relative error in bf16 of providers other than PlanLM: sums over a sentence's tokens round at every step."""

BF16_MARGIN = 1e-3
"""In bf16 PlanLM's error may exceed that of the same tensor in strong eager by this much."""


def check(block: Block, found: Mapping[str, Provider]) -> list[str]:
    """Compare every provider with float64.

    Args:
        block (Block): the inputs, float32 or bf16.
        found (Mapping[str, Provider]): the providers.

    Returns:
        The providers that ran out of memory, which have nothing to compare.

    Raises:
        WrongResultError: on the first tensor of a provider that is beyond its tolerance.
    """
    want = _named(block, *forward_backward(strong_eager, block.in_float64()))
    baseline: dict[str, float] = {}
    if block.logits.dtype == torch.bfloat16:
        baseline = _errors(_named(block, *forward_backward(strong_eager, block)), want)
    exhausted = []
    for name, provider in found.items():
        got = attempt(provider, block)
        if got is None:
            exhausted.append(name)
            continue
        for tensor, error in _errors(_named(block, *got), want).items():
            tolerance = _tolerance(name, block.logits.dtype, baseline.get(tensor, 0.0))
            if not error <= tolerance:
                raise WrongResultError(
                    f"{block.shape.name} {block.logits.dtype}: {name}: {tensor}: relative error {error:.2e}, "
                    f"tolerance {tolerance:.2e}; nothing was timed"
                )
        del got
    return exhausted


def attempt(provider: Provider, block: Block) -> tuple[Sequence[Tensor], tuple[Tensor, ...]] | None:
    """`forward_backward`, or None where the memory does not suffice."""
    try:
        return forward_backward(provider, block)
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # the CPU allocator's words; it has no class of its own
            return None
        raise


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest absolute value wanted."""
    got, want = got.detach(), want.detach()
    scale = want.double().abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float((got.double() - want.double()).abs().max() / scale)


def _tolerance(provider: str, dtype: torch.dtype, baseline: float) -> float:
    if dtype == torch.bfloat16:
        return baseline + BF16_MARGIN if provider == "planlm" else BF16_TOLERANCE
    return FLOAT32_TOLERANCE.get(provider, 1e-4)


def _named(block: Block, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by the names that a message uses."""
    named = {f"y[{layer}]": output.detach() for layer, output in enumerate(outputs)}
    return named | {f"gradient of {name}": tensor for name, tensor in zip(block.leaves(), gradients, strict=True)}


def _errors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: relative_error(got[name], tensor) for name, tensor in want.items()}
