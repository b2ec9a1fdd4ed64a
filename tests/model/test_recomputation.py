"""Tensors made again for the backward pass: what is kept, and that gradients do not notice."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from planlm.kernels import StackedPlan
from planlm.model import PlanLMForCausalLM
from planlm.model.recomputation import InputRecomputation


class Doubled(nn.Module):
    """`(2 x + shift) weight`, of which the product does not keep its input where it `recomputes`."""

    def __init__(self, *, recomputes: bool = True) -> None:
        super().__init__()
        self.product = nn.Linear(4, 5, bias=False)
        self.shift = torch.randn(4)
        self.made: weakref.ref[Tensor] | None = None
        if recomputes:
            self.recomputation = InputRecomputation(self.product)
            self.product.register_forward_pre_hook(self._before)

    def function(self, x: Tensor) -> Tensor:
        return 2 * x + self.shift

    def _before(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.recomputation.enter(inputs[0], self.function, self.x, self.shift)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        made = self.function(x)
        self.made = weakref.ref(made)
        out: Tensor = self.product(made)
        return out


@pytest.fixture
def pair() -> tuple[Doubled, Doubled]:
    kept, again = Doubled(recomputes=False), Doubled()
    again.load_state_dict(kept.state_dict())
    again.shift = kept.shift
    return kept, again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_is_not_kept_and_is_the_same_again(pair: tuple[Doubled, Doubled], dtype: torch.dtype) -> None:
    x, grads = torch.randn(3, 4, requires_grad=True), []
    for module in pair:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = module(x)
        grads.append(torch.autograd.grad(out.float().square().sum(), (x, module.product.weight), retain_graph=True))
        again = torch.autograd.grad(out.float().square().sum(), (x, module.product.weight))
        assert all(torch.equal(one, other) for one, other in zip(grads[-1], again, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    if dtype == torch.float32:  # autocast's product keeps a copy
        kept, again = pair
        assert kept.made is not None and again.made is not None
        kept_out, again_out = kept(x), again(x)
        assert kept.made() is not None and again.made() is None
        del kept_out, again_out


@pytest.mark.parametrize("changed", ["x", "shift", "weight"])
def test_changes_in_place_are_refused(pair: tuple[Doubled, Doubled], changed: str) -> None:
    _, module = pair
    x = torch.randn(3, 4)
    x_ = x.clone().requires_grad_()
    out = module(x_)
    with torch.no_grad():
        {"x": x_, "shift": module.shift, "weight": module.product.weight}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_an_input_changed_before_the_product_is_kept(pair: tuple[Doubled, Doubled]) -> None:
    _, module = pair
    x, made = torch.randn(3, 4), []

    def change(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        made.append(inputs[0].add_(1))

    module.product.register_forward_pre_hook(change)  # after the recipe was given
    module(x).sum().backward()
    torch.testing.assert_close(module.product.weight.grad, torch.ones(5, 3) @ made[0])


def test_other_hooks_go_first(pair: tuple[Doubled, Doubled]) -> None:
    seen: list[int] = []
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: seen.append(kept.numel()) or kept, lambda kept: kept):
        pair[1](x).sum().backward()
    assert 12 in seen


def test_an_error_in_the_product_leaves_no_hooks(pair: tuple[Doubled, Doubled]) -> None:
    with pytest.raises(RuntimeError):
        pair[1](torch.randn(3, 3, requires_grad=True))
    module = Doubled()
    module.shift = torch.zeros(())
    with pytest.raises(RuntimeError):
        module(torch.randn(3, 3, requires_grad=True))
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_results_that_are_dropped_are_freed(lm_folder: Callable[[str], str]) -> None:
    """What keeps its own result would hold itself alive in autograd's hooks, where no collector sees it."""
    model = PlanLMForCausalLM.from_lm(lm_folder("gpt2"), torch.randn(7, 16), conditioned_layers=2, encoder="none")
    inputs = batch()

    def alive() -> int:
        gc.collect()
        return sum(isinstance(found, Tensor) for found in gc.get_objects())

    del [model(**inputs)][0]
    gc.freeze()  # what earlier tests left is not looked at: it may go at any collection
    try:
        before = alive()
        for _ in range(3):
            out = model(**inputs)
            del out
        assert alive() == before
    finally:
        gc.unfreeze()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 300, (2, 10))
    return {
        "input_ids": ids,
        "labels": ids,
        "segment_ids": torch.arange(20).view(2, 10) // 5,
        "segment_rows": torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]),
        "sentence_embeddings": torch.randn(2, 2, 16),
    }


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
    inputs = batch()
    gradients: list[dict[str, Tensor]] = []
    for recomputes in (True, False):
        if not recomputes:
            monkeypatch.setattr(InputRecomputation, "enter", lambda *_: None)
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


def test_a_copy_computes_with_its_own_weights(lm_folder: Callable[[str], str]) -> None:
    model = PlanLMForCausalLM.from_lm(lm_folder("gpt2"), torch.randn(7, 16), conditioned_layers=2, encoder="none").lm
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fresh = AutoModelForCausalLM.from_pretrained(lm_folder("gpt2"))
    ids = batch()["input_ids"]
    for lm in (copied, fresh):
        lm(ids, labels=ids).loss.backward()
    for one, other in zip(copied.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
