"""`packed_attention` against float64 attention under a mask, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from planlm.kernels import cpp, environment, has_packed_attention, packed_attention, use_backend

pytestmark = pytest.mark.skipif(environment.interpreted(), reason="has no Triton kernel")
CPU = torch.device("cpu")
HAS_KERNEL = cpp.why_not() is None and has_packed_attention(CPU, torch.bfloat16)
needs_kernel = pytest.mark.skipif(not HAS_KERNEL, reason="no bf16 products here")


def starts(batch: int, width: int, documents: int, generator: torch.Generator) -> Tensor:
    """`[B, W]`: where each position's document begins, for so many documents at most in a row."""
    first = torch.zeros(batch, width, dtype=torch.int64)
    for row in first:
        for cut in torch.randint(width, (documents - 1,), generator=generator).sort().values.tolist():
            row[cut:] = cut
    return first


def masked(query: Tensor, key: Tensor, value: Tensor, first: Tensor, scale: float) -> Tensor:
    """The definition, in the inputs' dtype."""
    shared = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(shared, dim=2), value.repeat_interleave(shared, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    at = torch.arange(query.shape[1])
    hidden = (at > at[:, None]) | (at < first[:, :, None])
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1), value)


SHAPES = {  # B, W, H, G, d, documents in a row
    "two positions": (8, 2, 4, 1, 16, 1),
    "ragged": (2, 130, 2, 1, 64, 3),
    "several tiles, shared keys": (2, 600, 4, 2, 32, 1),
    "several tiles, packed": (1, 1026, 6, 2, 80, 6),
    "many short documents": (1, 700, 2, 2, 128, 300),
    "small heads": (3, 62, 2, 2, 6, 9),
}


@needs_kernel
@pytest.mark.parametrize("view", [False, True], ids=["[B, W, H, d]", "a view of [B, H, W, d]"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_is_as_exact_as_torchs(shape: tuple[int, ...], view: bool) -> None:
    batch, width, heads, groups, size, documents = shape
    generator = torch.Generator().manual_seed(0)

    def random(count: int) -> Tensor:
        drawn = torch.randn(batch, *((count, width) if view else (width, count)), size, generator=generator).bfloat16()
        return (drawn.transpose(1, 2) if view else drawn).requires_grad_()

    inputs = [random(heads), random(groups), random(groups)]
    first = starts(batch, width, documents, generator)
    upstream = torch.randn(batch, width, heads, size, generator=generator).bfloat16()

    def run(function: str) -> list[Tensor]:
        tensors = [tensor.double() for tensor in inputs] if function == "exact" else inputs
        if function == "exact":
            out = masked(*tensors, first, size**-0.5)
        else:
            with use_backend(function):
                out = packed_attention(*tensors, first, size**-0.5)
        return [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]

    exact, torchs, ours = run("exact"), run("reference"), run("cpp")
    for name, want, theirs, got in zip(("value", "query", "key", "value's"), exact, torchs, ours, strict=True):
        scale = want.double().norm()
        error, allowed = ((other.double() - want).norm() / scale for other in (got, theirs))
        assert got.dtype == torch.bfloat16 and error <= allowed + 1e-3, f"{name}: {error:.2e}, torch's {allowed:.2e}"


@needs_kernel
def test_same_bits_again_and_nothing_from_other_documents() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 300, 2, 16, generator=generator).bfloat16() for _ in range(3))
    first = torch.zeros(1, 300, dtype=torch.int64)
    first[:, 101:] = 101
    whole = packed_attention(query, key, value, first, 0.25)
    assert torch.equal(whole, packed_attention(query, key, value, first, 0.25))
    broken = key.clone()
    broken[:, :101] = torch.nan  # of another document
    alone = packed_attention(query, broken, value, first, 0.25)
    assert torch.equal(alone[:, 101:], whole[:, 101:]) and alone[:, :101].isnan().all()


@needs_kernel
def test_large_scores_stay_finite() -> None:
    query = torch.full((1, 64, 1, 8), 300.0, dtype=torch.bfloat16, requires_grad=True)
    out = packed_attention(query, query, query, torch.zeros(1, 64, dtype=torch.int64), 1.0)
    out.sum().backward()
    assert torch.equal(out, torch.full_like(out, 300.0)) and query.grad is not None and query.grad.isfinite().all()


@needs_kernel
@pytest.mark.parametrize("first", [[0, 1, 0, 0], [0, 0, 3, 3], [-1, 0, 0, 0]], ids=["falls", "ahead", "negative"])
def test_faulty_starts_are_refused(first: list[int]) -> None:
    one = torch.zeros(1, 4, 1, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="first: got"):
        packed_attention(one, one, one, torch.tensor([first]), 1.0)


@needs_kernel
def test_operator_keeps_torchs_rules() -> None:
    tensors = [torch.randn(1, 6, 2, 4).bfloat16().requires_grad_() for _ in range(3)]
    first = torch.zeros(1, 6, dtype=torch.int64)
    torch.library.opcheck(torch.ops.planlm.packed_attention.default, (*tensors, first, 0.5))
    (slope,) = torch.autograd.grad(packed_attention(*tensors, first, 0.5).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        slope.sum().backward()


@pytest.mark.parametrize("width", [5, 8], ids=["odd", "even"])
def test_float32_and_odd_widths_go_to_torch(width: int) -> None:
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, width, 2, 4, generator=generator) for _ in range(3))
    first = starts(2, width, 2, generator)
    got = packed_attention(query, key, value, first, 0.5)
    torch.testing.assert_close(got, masked(query, key, value, first, 0.5))
    half = packed_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), first, 0.5)
    assert half.dtype == torch.bfloat16 and F.mse_loss(half.float(), got) < 1e-4


@needs_kernel
def test_documents_need_not_be_contiguous_and_shapes_must_agree() -> None:
    query, key, value = torch.randn(3, 2, 128, 2, 16).bfloat16().unbind()
    first = starts(2, 128, 3, torch.Generator().manual_seed(0))
    want = packed_attention(query, key, value, first, 0.25)
    strided = torch.stack((first, torch.zeros_like(first)), dim=-1)[..., 0]
    assert torch.equal(packed_attention(query, key, value, strided, 0.25), want)
    row = first[:1].expand(2, 128)
    assert torch.equal(
        packed_attention(query, key, value, row, 0.25), packed_attention(query, key, value, row.contiguous(), 0.25)
    )
    for wrong in ((key[:, :64], value[:, :64], first), (key[:1], value[:1], first), (key, value[..., :8], first)):
        with pytest.raises(ValueError, match="needs the same sequences, positions and channels in all"):
            packed_attention(query, *wrong, 0.25)
