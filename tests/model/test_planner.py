"""The planner: what a state may see, documents that share a sequence, and what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from planlm.errors import InputError
from planlm.model.planner import Planner

A, K = 16, 7


def planner(**options: Any) -> Planner:
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


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("context", [1, 2, 3, 5])
def test_a_state_sees_the_last_sentences_exactly(context: int, layers: int) -> None:
    """Two documents in a sequence; a position holds the sentence before it."""
    model = Planner(A, K, layers=layers, heads=2, context=context).eval()
    embeddings, positions = torch.randn(1, 16, A), torch.tensor([[*range(9), *range(7)]])
    states = model(embeddings, positions)
    for at in (1, 4, 8, 9, 12):
        changed = embeddings.clone()
        changed[:, at] = torch.randn(A)
        moved = (model(changed, positions) != states).any(dim=-1)[0].tolist()
        end = 9 if at < 9 else 16
        assert moved == [at <= here < min(at + context, end) and at != 9 for here in range(16)]


def test_the_loss_is_a_mean_over_the_horizon() -> None:
    model, states = Planner(A, K, heads=2, horizon=3).eval(), torch.randn(3, A)
    first, ahead = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[4, 5], [6, -1], [-1, -1]])
    found = model.horizon_nll(states, first, ahead)
    one, two = (head(states).log_softmax(dim=-1) for head in model.ahead)
    expected = [(1 - one[0, 4] - two[0, 5]) / 3, (2 - one[1, 6]) / 2, torch.tensor(3.0)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_bf16_stays_close_to_float32() -> None:
    model, row = planner(), torch.randn(2, 10, A)
    positions = torch.tensor([[*range(6), *range(4)], [*range(10)]])
    with torch.autocast("cpu", torch.bfloat16):
        states = model(row, positions)
    torch.testing.assert_close(states.float(), model(row, positions), rtol=0.1, atol=0.1)


def test_no_sentences_at_all() -> None:
    assert planner()(torch.zeros(0, 4, A)).shape == (0, 4, A)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    model = planner(dropout=0.25, context=3, horizon=2)
    model.save(tmp_path)
    loaded = Planner.load(tmp_path).eval()
    embeddings = torch.randn(2, 3, A)
    assert loaded.settings == model.settings and torch.equal(loaded(embeddings), model(embeddings))


def test_planners_from_before_context_and_horizon_are_read(tmp_path: Path) -> None:
    model = planner()
    model.save(tmp_path)
    settings = json.loads((tmp_path / "planner.json").read_text())
    (tmp_path / "planner.json").write_text(
        json.dumps({name: value for name, value in settings.items() if name not in ("context", "horizon")})
    )
    assert Planner.load(tmp_path).settings == model.settings


def test_heads_have_to_divide_the_width() -> None:
    with pytest.raises(InputError, match="3 do not divide"):
        Planner(A, K, heads=3)
