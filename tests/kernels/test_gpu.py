"""The operations on a CUDA device at the sizes of models: in streams, graphs and compiled code, and twice the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import block as blocks
from benchmarks.block import Block, Shape
from benchmarks.correctness import check, relative_error
from planlm.kernels import cross_entropy_, packed_attention, projection, varlen_attention
from planlm.kernels.lm import Documents

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
SHAPES = {  # S, K, A, L, D / L, T
    "stacked": Shape("stacked", 200, 1024, 384, 3, 576, 4096),
    "odd": Shape("odd", 77, 1000, 100, 2, 36, 1001),
    "many actions": Shape("many", 300, 32768, 384, 1, 768, 6000),
    "many sentences": Shape("long", 3000, 512, 768, 1, 768, 90000),
}


@pytest.fixture(params=["composed", "streamed"])
def _form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "STREAMED_BYTES", 0 if request.param == "streamed" else 1 << 60)
    monkeypatch.setenv("PLANLM_TUNE", "0")


def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=[(shape, dtype) for shape in SHAPES for dtype in (torch.bfloat16, torch.float32)], ids=str)
def block(request: pytest.FixtureRequest) -> Iterator[Block]:
    shape, dtype = request.param
    yield blocks.setup(SHAPES[shape], dtype, cuda())
    torch.cuda.empty_cache()


def run(block: Block) -> list[Tensor]:
    outputs, gradients = blocks.forward_backward(blocks.planlm, block)
    return [*outputs, *gradients]


@pytest.mark.usefixtures("_form")
def test_a_block_is_what_float64_gives_and_twice_the_same(block: Block) -> None:
    assert not check(block, {"planlm": blocks.planlm})
    first = [tensor.clone() for tensor in run(block)]
    for _ in range(3):
        for one, other in zip(run(block), first, strict=True):
            assert torch.equal(one, other)


@pytest.mark.usefixtures("_form")
def test_a_block_in_a_graph_computes_from_new_values(block: Block) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(block)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(block)
    with torch.no_grad():
        block.logits.copy_(block.logits.flip(0))
        block.codebook.mul_(-0.5)
    graph.replay()
    for one, other in zip(captured, run(block), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("_form")
def test_a_block_in_a_side_stream_is_the_same_and_waits_for_no_other(block: Block) -> None:
    """Forward: behind a backward pass autograd itself waits for the streams that the inputs were made in."""
    want = [tensor.clone() for tensor in run(block)]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for sleeps in (False, True):  # the first time takes memory from the device, for which it may wait
        if sleeps:
            torch.cuda._sleep(1_000_000_000)  # half a second in the default stream
        with torch.cuda.stream(side), torch.no_grad():
            got = blocks.planlm(block)
            done = side.record_event()
        done.synchronize()
        assert not sleeps or not torch.cuda.default_stream().query()
        torch.cuda.synchronize()
    with torch.cuda.stream(side):
        again = run(block)
    side.synchronize()
    for one, other in zip([*got, *again], [*want[: len(got)], *want], strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("_form")
def test_a_compiled_block_is_the_same(block: Block) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(blocks.planlm, fullgraph=True, dynamic=False)
    assert not check(block, {"planlm": compiled})


@pytest.mark.parametrize("offset", [0.0, 100.0, 3e4])
@pytest.mark.parametrize("width", [50257, 50304, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cross_entropy_of_a_vocabulary(dtype: torch.dtype, width: int, offset: float) -> None:
    torch.manual_seed(0)
    logits = (2 * torch.randn(300, width, device=cuda()) + offset).to(dtype)
    target = torch.randint(width, (300,), device=cuda())
    target[::7] = -1
    if dtype == torch.bfloat16 and offset > 1e4:
        logits[:, ::2] += 256  # bfloat16 numbers are 128 apart there
    exact = logits.double().requires_grad_()
    nll = F.cross_entropy(exact, target, reduction="none", ignore_index=-1)
    nll.sum().backward()
    gradient, loss = cross_entropy_(logits.clone(), target)
    again, loss_again = cross_entropy_(logits.clone(), target)
    assert torch.equal(gradient, again) and torch.equal(loss, loss_again)
    assert exact.grad is not None
    torch.testing.assert_close(loss.double(), nll.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


@pytest.mark.parametrize("window", [None, 64])
def test_flash_attention_over_documents_is_attention_under_their_mask(window: int | None) -> None:
    """As far from float64 as torch's own attention with a mask in bf16 is, and a little more."""
    torch.manual_seed(0)
    shapes = [(2, 512, 6, 64), (2, 512, 2, 64), (2, 512, 2, 64)]
    offsets = torch.tensor([0, 100, 103, 512, 700, 1024, 1024], dtype=torch.int32, device=cuda())
    first = torch.repeat_interleave(offsets[:-1], offsets.diff()).long().view(2, 512) % 512
    inputs = [torch.randn(shape, device=cuda()) for shape in shapes]
    upstream = torch.randn(shapes[0], device=cuda())

    def of(dtype: torch.dtype, attend: Callable[[Sequence[Tensor]], Tensor]) -> list[Tensor]:
        made = [tensor.to(torch.bfloat16).to(dtype).requires_grad_() for tensor in inputs]
        out = attend(made)
        return [out, *torch.autograd.grad(out, made, upstream.to(out.dtype))]

    def masked(made: Sequence[Tensor]) -> Tensor:
        at = torch.arange(512, device=cuda())
        start = first if window is None else torch.maximum(first, at - window + 1)
        if window is None:
            return packed_attention(*made, start, 0.125)
        seen = (at <= at[:, None]) & (at >= start[:, :, None])
        query, key, value = (tensor.transpose(1, 2) for tensor in made)
        mixed = F.scaled_dot_product_attention(query, key, value, seen[:, None], scale=0.125, enable_gqa=True)
        return mixed.transpose(1, 2)

    want = of(torch.float64, masked)
    theirs = of(torch.bfloat16, masked)
    ours = of(torch.bfloat16, lambda made: varlen_attention(*made, Documents(offsets, 512), 0.125, window))
    for one, other, exact in zip(ours, theirs, want, strict=True):
        assert relative_error(one, exact) <= 1.5 * relative_error(other, exact) + 1e-3
