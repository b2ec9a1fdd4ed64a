"""The planner: what a state may see, documents that share a sequence, and what is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from planlm.errors import InputError
from planlm.model.planner import Planner

A, K = 16, 7


def planner(**options: float) -> Planner:
    return Planner(A, K, layers=2, heads=2, **options).eval()


def test_a_state_sees_the_sentences_before_it_and_nothing_else() -> None:
    model, embeddings = planner(), torch.randn(1, 6, A)
    states = model(embeddings)
    for position in range(6):  # holds sentence `position - 1`
        changed = embeddings.clone()
        changed[:, position] = torch.randn(A)
        same = (model(changed) == states).all(dim=-1)[0].tolist()
        assert same == [at < position or position == 0 for at in range(6)], "the first position's embedding is not read"


def test_documents_of_one_sequence_do_not_see_each_other() -> None:
    model, lengths = planner(), (3, 1, 5)
    documents = [torch.randn(1, length, A) for length in lengths]
    row = torch.cat([*documents, torch.randn(1, 1, A)], dim=1).requires_grad_()
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4, 0]])  # the last position is padding
    states = model(row, positions)
    parts = states.split((*lengths, 1), dim=1)
    for document, part in zip(documents, parts, strict=False):
        torch.testing.assert_close(part, model(document), rtol=1e-5, atol=1e-5)
    (slope,) = torch.autograd.grad(parts[2].square().sum(), row)
    assert (slope[:, :5] == 0).all() and (slope[:, 5 + 1 : 9] != 0).all()


def test_bf16_stays_close_to_float32() -> None:
    model, row = planner(), torch.randn(2, 10, A)
    positions = torch.tensor([[*range(6), *range(4)], [*range(10)]])
    with torch.autocast("cpu", torch.bfloat16):
        states = model(row, positions)
    torch.testing.assert_close(states.float(), model(row, positions), rtol=0.1, atol=0.1)


def test_no_sentences_at_all() -> None:
    assert planner()(torch.zeros(0, 4, A)).shape == (0, 4, A)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    model = planner(dropout=0.25)
    model.save(tmp_path)
    loaded = Planner.load(tmp_path).eval()
    embeddings = torch.randn(2, 3, A)
    assert loaded.settings == model.settings and torch.equal(loaded(embeddings), model(embeddings))


def test_heads_have_to_divide_the_width() -> None:
    with pytest.raises(InputError, match="3 do not divide"):
        Planner(A, K, heads=3)
