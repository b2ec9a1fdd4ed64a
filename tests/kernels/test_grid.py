"""Values and every gradient against float64 over a grid of shapes and logits, on every backend.

The yardstick for bf16 is what a user would write in bf16 (naive.py): root mean square errors are compared, since the
largest one is mostly the luck of the last rounding; it may exceed eager's by one such rounding. An error is relative to
the values wanted, or to 1, the size of the upstream gradients, where logits so extreme leave nothing but rounding.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from planlm.kernels import plan_projection, plan_projection_from_hidden

from .cases import hidden_inputs, projection_inputs, projection_options, run, truth
from .naive import eager_from_hidden, plan_projection_eager

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = {  # S, K, A, D
    "ragged": (37, 211, 19, 53),
    "one sentence": (1, 300, 17, 31),
    "one of each": (1, 1, 1, 1),
    "one action": (5, 1, 3, 4),
    "few actions, many sentences": (300, 5, 9, 40),  # p (E W^T)
    "two tiles of actions": (1030, 1100, 7, 5),
}
if os.environ.get("TRITON_INTERPRET") == "1":  # tiles of 16, so that smaller shapes have several, and no time to lose
    SHAPES = {"ragged": (19, 83, 19, 37), **{name: SHAPES[name] for name in ("one of each", "one action")}}
LOGITS = ("normal", "extreme", "one-hot", "equal")


def logits_of(kind: str, normal: Tensor) -> Tensor:
    """Logits that make a softmax hard."""
    match kind:
        case "extreme":
            return normal * 1e4 / normal.abs().max()
        case "one-hot":
            return torch.full_like(normal, -1e4).index_fill(1, torch.tensor([normal.shape[1] // 2]), 1e4)
        case "equal":
            return torch.full_like(normal, 3.0)
    return normal


def worst(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value wanted, or over 1."""
    if want.numel() == 0:
        return 0.0
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1.0)).item()


def mean(got: Tensor, want: Tensor) -> float:
    """Root of the summed squares of the difference over that of the values wanted, or over 1."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1.0)).item()


def check(got, found, want, wanted, eager, usual) -> None:
    """Values and gradients against float64: within 1e-5, or where there is one within eager's own error plus 1e-3."""
    values = {name: pair for name, *pair in zip(got._fields, got, want, eager or want, strict=True)}
    values |= {f"gradient of {name}": [found[name], exact, (usual or wanted)[name]] for name, exact in wanted.items()}
    for name, (ours, exact, theirs) in values.items():
        if eager is None:
            assert worst(ours, exact) <= 1e-5, f"{name}: {worst(ours, exact):.3g}"
        else:
            assert mean(ours, exact) <= mean(theirs, exact) + 1e-3, f"{name}: {mean(ours, exact):.3g}"
            assert worst(ours, exact) <= worst(theirs, exact) + 1e-3 + 2**-8, f"{name}: {worst(ours, exact):.3g}"


@pytest.mark.parametrize("labels", ["some", "none"])
@pytest.mark.parametrize("selection", ["soft", "gumbel", "top-k"])
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_logits(dtype: torch.dtype, shape: str, kind: str, selection: str, labels: str) -> None:
    sizes = SHAPES[shape]
    inputs = projection_inputs(*sizes, dtype=dtype)
    inputs["logits"] = logits_of(kind, inputs["logits"].detach()).requires_grad_()
    options = projection_options(selection, "rows", *sizes[:2], dtype=dtype)
    if kind == "extreme" and selection == "gumbel":
        # A sum of logit and noise near 1e4 has an error of 1e-3 in float32: only noise it can hold is comparable.
        options["noise"] = options["noise"].detach().mul(4).round().requires_grad_()
        inputs["logits"] = inputs["logits"].detach().round().requires_grad_()
    if labels == "none":
        options["oracle"] = torch.full_like(options["oracle"], -1)
    eager = run(plan_projection_eager, inputs, options) if dtype != torch.float32 else (None, None)
    check(*run(plan_projection, inputs, options), *truth(plan_projection, inputs, options), *eager)


@pytest.mark.parametrize("selection", ["soft", "top-k"])
@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_hidden(dtype: torch.dtype, shape: str, scale: float, selection: str) -> None:
    num_sentences, num_actions, size, plan_size = SHAPES[shape]
    inputs = hidden_inputs(num_sentences, num_actions, 24, size, plan_size, dtype=dtype)
    # Whole numbers: products of theirs are the same in every precision, so large logits stay comparable.
    for name in ("hidden", "head", "head_bias"):
        values = (inputs[name].detach() * 2).round()
        inputs[name] = (values * scale if name != "head" else values).requires_grad_()
    options = projection_options(selection, "rows", num_sentences, num_actions, dtype=dtype)
    eager = run(eager_from_hidden, inputs, options) if dtype != torch.float32 else (None, None)
    found = run(plan_projection_from_hidden, inputs, options)
    check(*found, *truth(plan_projection_from_hidden, inputs, options), *eager)
