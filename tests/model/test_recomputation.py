"""Tensors made again for the backward pass: what is kept, and that gradients do not notice."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from planlm.kernels import StackedPlan
from planlm.model import PlanLMForCausalLM
from planlm.model.recomputation import recomputable, recomputing


def twice(x: Tensor) -> Tensor:
    return 2 * x


def test_what_was_named_is_not_kept_and_is_the_same_again() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    grads = []
    for context in (nullcontext, recomputing):
        with context():
            made = twice(x)
            recomputable(made, twice, x)
            out = made.view(3, 4) @ weight
        alive = weakref.ref(made)
        del made
        assert (alive() is None) == (context is recomputing)
        grads.append(torch.autograd.grad(out.square().sum(), (x, weight)))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_what_changed_in_place_is_kept_or_refused() -> None:
    x, weight = torch.randn(3, 4), torch.randn(4, 5, requires_grad=True)
    with recomputing():
        made = twice(x)
        recomputable(made, twice, x)
        made += 1
        out = made @ weight
    (grad,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(grad, made.T @ torch.ones(3, 5))
    with recomputing():
        made = twice(x)
        recomputable(made, twice, x)
        out = made @ weight
    x += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


def test_autocast_is_as_it_was() -> None:
    x, weight, then = torch.randn(8, 8), torch.randn(8, 8), torch.randn(8, 8, requires_grad=True)
    with recomputing(), torch.autocast("cpu", torch.bfloat16):
        made = x @ weight  # bf16
        recomputable(made, lambda x: x @ weight, x)
        out = made @ then
    (grad,) = torch.autograd.grad(out.sum(), then)
    assert torch.equal(grad, (made.T @ torch.ones(8, 8, dtype=torch.bfloat16)).float())


@contextmanager
def collected(made: list[weakref.ref[Tensor]], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every sum of a layer's input and its plan that is made within."""
    add = StackedPlan.add

    def noted(*args: object, **kwargs: object) -> Tensor:
        planned = add(*args, **kwargs)  # type: ignore[arg-type]
        made.append(weakref.ref(planned))
        return planned

    with monkeypatch.context() as patch:
        patch.setattr(StackedPlan, "add", noted)
        yield


@pytest.mark.parametrize("lora", [None, (2, 4.0)])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sums_with_the_plan_are_not_kept(
    family: str,
    gate: bool,
    lora: tuple[int, float] | None,
    lm_folder: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = PlanLMForCausalLM.from_lm(
        lm_folder(family), torch.randn(7, 16), conditioned_layers=2, encoder="none", gate=gate, lora=lora
    ).train()
    for parameter in model.adapter.parameters():
        nn.init.normal_(parameter)
    ids = torch.randint(0, 300, (2, 10))
    inputs = {
        "input_ids": ids,
        "labels": ids,
        "segment_ids": torch.arange(20).view(2, 10) // 5,
        "segment_rows": torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]),
        "sentence_embeddings": torch.randn(2, 2, 16),
    }
    gradients: list[dict[str, Tensor]] = []
    for recomputes in (False, True):
        monkeypatch.setattr(PlanLMForCausalLM, "_recomputes", lambda _, recomputes=recomputes: recomputes)
        made: list[weakref.ref[Tensor]] = []
        torch.manual_seed(0)
        with collected(made, monkeypatch):
            loss = model(**inputs).loss
        gc.collect()
        assert len(made) == 2
        assert all((planned() is None) == recomputes for planned in made)
        model.zero_grad()
        loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
