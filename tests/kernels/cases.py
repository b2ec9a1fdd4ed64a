"""Inputs and options that the kernel tests share, and how they compare tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from planlm import selections
from planlm.kernels import PlanProjection, use_backend
from planlm.kernels.reference import SELECTIONS, STRAIGHT_THROUGH

HALVES = [torch.bfloat16, torch.float16]
Results = tuple[PlanProjection, dict[str, Tensor]]
"""Outputs, and gradients by the names of inputs."""
STEPPED = STRAIGHT_THROUGH
"""Selections whose forward is a step function of the logits while their gradient is that of the soft mixture."""
PLANNING = tuple(name for name in SELECTIONS if selections.SELECTIONS[name].trains_planner)
"""Selections whose mixture sends a gradient to the planner."""
MIXINGS = ("unlabelled", "labelled", "number", "rows")
"""No oracle; oracle for the cross-entropy alone; one weight for all sentences; a weight each."""


def seeded(seed: int) -> torch.Generator:
    """A generator on the device of the tests."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def random(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """A leaf that requires a gradient, of standard normal values."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def projection_inputs(
    num_sentences: int = 5,
    num_actions: int = 7,
    size: int = 3,
    plan_size: int = 4,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """logits, codebook, weight and bias."""
    generator = seeded(seed)
    return {
        "logits": random(num_sentences, num_actions, generator=generator, dtype=dtype),
        "codebook": random(num_actions, size, generator=generator, dtype=dtype),
        "weight": random(plan_size, size, generator=generator, dtype=dtype),
        "bias": random(plan_size, generator=generator, dtype=dtype),
    }


def hidden_inputs(
    num_sentences: int = 5,
    num_actions: int = 7,
    state_size: int = 6,
    size: int = 3,
    plan_size: int = 4,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """hidden, head, head_bias, codebook, weight and bias."""
    rest = projection_inputs(num_sentences, num_actions, size, plan_size, dtype=dtype, seed=seed)
    del rest["logits"]
    generator = seeded(seed + 1)
    return {
        "hidden": random(num_sentences, state_size, generator=generator, dtype=dtype),
        "head": random(num_actions, state_size, generator=generator, dtype=dtype),
        "head_bias": random(num_actions, generator=generator, dtype=dtype),
        **rest,
    }


def projection_options(
    selection: str,
    mixing: str = "unlabelled",
    num_sentences: int = 5,
    num_actions: int = 7,
    *,
    temperature: float = 0.7,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Any]:
    """Options that a selection takes; noise and a weight each require gradients. Every third label is missing."""
    generator = seeded(seed + 2)
    options: dict[str, Any] = {"selection": selection, "temperature": temperature}
    if selection.startswith("gumbel"):
        options["noise"] = random(num_sentences, num_actions, generator=generator, dtype=dtype)
    if selection == "top-k":
        options["top_k"] = max(1, num_actions // 2)
    if selection == "oracle" or mixing != "unlabelled":
        oracle = torch.randint(num_actions, (num_sentences,), generator=generator)
        if selection != "oracle":
            oracle[2::3] = -1
        options["oracle"] = oracle
    if mixing == "number":
        options["oracle_weight"] = 0.3
    elif mixing == "rows":
        weights = 0.1 + 0.8 * torch.rand(num_sentences, generator=generator, dtype=torch.float64)
        options["oracle_weight"] = weights.to(dtype).requires_grad_()
    return options


def leaves(inputs: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among inputs and options that require a gradient."""
    everything = {**inputs, **options}
    return {name: value for name, value in everything.items() if isinstance(value, Tensor) and value.requires_grad}


def upstream(outputs: Sequence[Tensor], seed: int = 9) -> list[Tensor]:
    """A random gradient for every output: sixteenths, so that they are the same numbers in every precision."""
    generator = seeded(seed)
    return [(16 * torch.randn(out.shape, generator=generator)).round().div(16).to(out.dtype) for out in outputs]


def gradients(outputs: Sequence[Tensor], wanted: Mapping[str, Tensor], seed: int = 9) -> dict[str, Tensor]:
    """Gradients of random upstream gradients for each wanted tensor; zeros where none reaches it."""
    pairs = [(out, up) for out, up in zip(outputs, upstream(outputs, seed), strict=True) if out.requires_grad]
    found = torch.autograd.grad(
        [out for out, _ in pairs], list(wanted.values()), [up for _, up in pairs], materialize_grads=True
    )
    return dict(zip(wanted, found, strict=True))


def sorted_ids(num_tokens: int, num_segments: int) -> Tensor:
    """Ids that never fall, a fifth of them -1, some segments without a token."""
    if num_segments == 0:
        return torch.full((num_tokens,), -1)
    generator = seeded(0)
    ids = torch.randint(num_segments, (num_tokens,), generator=generator).sort().values
    return ids.masked_fill(torch.rand(num_tokens, generator=generator) < 0.2, -1)


def run(function: Callable[..., PlanProjection], inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Results:
    """Outputs of a function, and gradients of every leaf."""
    outputs = function(**inputs, **options)
    return outputs, gradients(outputs, leaves(inputs, options))


def truth(function: Callable[..., PlanProjection], inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Results:
    """`run` on the reference in float64."""
    with use_backend("reference"):
        return run(function, in_float64(inputs), in_float64(options))


def in_float64(group: Mapping[str, Any]) -> dict[str, Any]:
    """The same values in float64, as leaves of their own."""
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in group.items()
    }


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest absolute value wanted."""
    if want.numel() == 0:
        return 0.0
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Fail with the tensor's name, the error and the worst index unless `relative_error` is within tolerance."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = relative_error(got, want)
    if not error <= tolerance:
        worst = torch.unravel_index((got.double() - want.double()).abs().argmax(), got.shape)
        at = tuple(int(index) for index in worst)
        raise AssertionError(
            f"{name}: relative error {error:.3g}, {error / tolerance:.3g} times the tolerance; "
            f"worst at {at}: {got[at].item()} for {want[at].item()}"
        )


def assert_same(got: Results, want: Results, tolerance: float, of_gradients: float | None = None) -> None:
    """`assert_close` of outputs and of every gradient that is wanted."""
    for name, value, expected in zip(PlanProjection._fields, got[0], want[0], strict=True):
        assert_close(name, value, expected, tolerance)
    for name, expected in want[1].items():
        assert_close(f"gradient of {name}", got[1][name], expected, of_gradients or tolerance)
