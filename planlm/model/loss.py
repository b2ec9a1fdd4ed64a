"""Cross-entropy of a large-vocabulary linear head without keeping the logits.

The gradient of the logits is formed chunk by chunk in the forward pass (Liger-Kernel's and torch's chunked
linear cross-entropy work alike), so that the logits of a chunk are all that exist: `CHUNK` bytes on a CPU, those of
`TOKENS` on a GPU. torch 2.13's own `linear_cross_entropy` with options does the same, but took 4 to 18 times as long
on a CPU (dev/log.md).

Sizes: N tokens, d channels, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planlm.errors import InputError
from planlm.kernels.backend import full_precision
from planlm.model.families import is_plain
from planlm.speedups.lm import cross_entropy_

CHUNK = 100 << 20
"""Bytes of logits at a time: those of 1,000 tokens over a vocabulary of 50,000 in bf16, enough for full matrix-product
speed and few enough sums of the weight's gradient: at half of it they took a fortieth of a step of GPT-2-small."""

MULTIPLE = 128
"""A chunk has a multiple of so many tokens: with 1,043 instead of 1,024 the products took a twentieth longer."""

TOKENS = 4096
"""Tokens of a chunk on a GPU, at most: 412 MB of logits of GPT-2 in bf16. Its products read the head twice and its
gradient in float32 once, and write that: 12 V d bytes a chunk. The gradient's product has 2 TOKENS V d operations for
8 V d + 2 TOKENS V bytes; on an H100 it is bound by memory below 1,200 (d = 2,048) to 2,000 tokens (d = 576)."""

ALIGNED = 64
"""On a GPU the head has a multiple of so many rows: with 50,257 no row of the logits but each eighth would begin at a
multiple of 16 bytes, which cuBLAS's fast kernels and the loss kernel's wide loads ask for."""

WORDS = 8192
"""Rows of the head whose gradient is formed at a time, before it is added in float32: 13 MB of GPT-2-small's 77."""


ROWS = 128
"""Tokens whose divergence is formed at a time, in float32: four matrices of 26 MB at a vocabulary of 50,000."""

ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Of a chunk's logits `[tokens, V]` and where it is among all tokens: the gradient of its loss with respect to them,
which may be the same tensor, and each token's loss `[tokens]`."""


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of hidden states, in their dtype, and of weight and bias, in float32; None for one that is not needed."""


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_loss: ChunkLoss
    ) -> tuple[Tensor, Tensor]:
        in_chunks = _by_cublas if _on_gpu(hidden) and len(hidden) > 0 else _by_words
        token_loss, ctx.gradients = in_chunks(hidden, weight, bias, chunk_loss, ctx.needs_input_grad[:3])
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(token_loss)
        return token_loss.sum(), token_loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place and let go: at this moment a step holds the most memory, and one of them is the head's size.
        if ctx.gradients is None:
            raise RuntimeError("loss of a linear head: its backward pass ran before; compute the loss again")
        gradients, ctx.gradients = zip(ctx.gradients, ctx.dtypes, strict=True), None
        return *(None if it is None else it.mul_(grad_sum.to(it.dtype)).to(dtype) for it, dtype in gradients), None


def _linear_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_loss: ChunkLoss) -> tuple[Tensor, Tensor]:
    """The sum of a chunked loss, and each token's; no gradient is formed where no backward pass can come.

    Parameters want theirs under `no_grad` too, as far as an autograd function is told, and the head's takes as long as
    the logits.
    """
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    with full_precision(hidden.device):
        found: tuple[Tensor, Tensor] = _LinearLoss.apply(hidden, weight, bias, chunk_loss)
    return found


def _by_words(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_loss: ChunkLoss, needs: Sequence[bool]
) -> tuple[Tensor, Gradients]:
    """Each token's loss, and the gradients of their sum that are needed, with little memory beside a chunk's logits."""
    token_loss = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
    grad_hidden = torch.zeros_like(hidden) if needs[0] else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
    grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] and bias is not None else None
    compute_weight = weight.to(hidden.dtype)
    compute_bias = None if bias is None else bias.to(hidden.dtype)
    size = CHUNK // (weight.shape[0] * hidden.element_size())  # tokens of a chunk
    size = max(1, size // MULTIPLE * MULTIPLE or size)
    for begin in range(0, hidden.shape[0], size):
        chunk = slice(begin, begin + size)
        logits = F.linear(hidden[chunk], compute_weight, compute_bias)  # [tokens, V]
        grad, token_loss[chunk] = chunk_loss(logits, chunk)
        if grad_hidden is not None:
            torch.mm(grad, compute_weight, out=grad_hidden[chunk])
        if grad_weight is not None:
            for words, grad_words in zip(grad_weight.split(WORDS), grad.split(WORDS, dim=1), strict=True):
                words += grad_words.t() @ hidden[chunk]
        if grad_bias is not None:
            grad_bias += grad.sum(dim=0, dtype=torch.float32)
    return token_loss, (grad_hidden, grad_weight, grad_bias)


def _by_cublas(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_loss: ChunkLoss, needs: Sequence[bool]
) -> tuple[Tensor, Gradients]:
    """`_by_words` for a GPU and at least one token: few large products, the weight's gradient summed by them.

    A bf16 product that is added to a float32 matrix in place rounds nothing to bf16, and makes no temporary.
    """
    num_tokens, num_words = len(hidden), len(weight)
    sums = torch.promote_types(hidden.dtype, torch.float32)
    head, offset = _aligned(weight, hidden.dtype), None if bias is None else _aligned(bias, hidden.dtype)
    size = -(-num_tokens // -(-num_tokens // TOKENS))  # tokens of a chunk: as many in each
    size = min(size + -size % MULTIPLE, num_tokens)
    logits = hidden.new_empty(size, len(head))  # one for all chunks; what is beyond the vocabulary stays 0
    token_loss = hidden.new_empty(num_tokens, dtype=torch.float32)
    grad_hidden = hidden.new_empty(hidden.shape) if needs[0] else None
    grad_head = hidden.new_empty(head.shape, dtype=sums) if needs[1] else None
    grad_bias = hidden.new_zeros(num_words, dtype=sums) if needs[2] else None
    for begin in range(0, num_tokens, size):
        chunk = slice(begin, begin + size)
        states = hidden[chunk]
        grad = logits[: len(states)]
        if offset is None:
            torch.mm(states, head.t(), out=grad)
        else:
            torch.addmm(offset, states, head.t(), out=grad)
        words = grad[:, :num_words]
        found, token_loss[chunk] = chunk_loss(words, chunk)
        if found is not words:
            words.copy_(found)
        if grad_hidden is not None:
            torch.mm(grad, head, out=grad_hidden[chunk])
        if grad_head is not None:  # the first chunk's product is not added to anything
            torch.addmm(grad_head, grad.t(), states, beta=min(begin, 1), out_dtype=sums, out=grad_head)
        if grad_bias is not None:
            grad_bias += words.sum(dim=0, dtype=sums)
    return token_loss, (grad_hidden, None if grad_head is None else grad_head[:num_words], grad_bias)


@contextlib.contextmanager
def in_one_chunk() -> Iterator[None]:
    """Within it a CPU has one chunk, as a GPU has of as few tokens: for who counts there what a GPU is asked."""
    global CHUNK
    before, CHUNK = CHUNK, 1 << 62
    try:
        yield
    finally:
        CHUNK = before


def _on_gpu(hidden: Tensor) -> bool:
    return hidden.device.type in ("cuda", "meta")


def _aligned(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A head's weight or bias in a dtype, with zeros up to a multiple of `ALIGNED` words."""
    num_words = len(parameter)
    if num_words % ALIGNED == 0:
        return parameter.to(dtype)
    padded = parameter.new_empty(num_words + -num_words % ALIGNED, *parameter.shape[1:], dtype=dtype)
    padded[:num_words] = parameter
    padded[num_words:] = 0
    return padded


def _dtype_of_products(hidden: Tensor) -> torch.dtype:
    """Autocast's where that is on, else that of `hidden`."""
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Summed and per-token cross-entropy of `hidden @ weight.T + bias`.

    Matrix products run in the dtype of `hidden`, or autocast's; everything after them in float32.

    Args:
        hidden: `[N, d]`.
        weight: `[V, d]`.
        labels: `[N]` int64, negative where not scored.
        bias: `[V]` or None.

    Returns:
        (sum of the scored tokens' NLL, nats, differentiable; NLL of each token `[N]` float32, detached, 0 where not
        scored).
    """
    hidden = hidden.to(_dtype_of_products(hidden))
    # A negative label is not scored.
    return _linear_loss(hidden, weight, bias, lambda logits, chunk: cross_entropy_(logits, labels[chunk]))


def divergence(hidden: Tensor, head: nn.Module, reference: tuple[Tensor, nn.Module | None], labels: Tensor) -> Tensor:
    """`KL(reference || LM)` of the next token, summed over the labelled ones; differentiable in the LM alone.

    Logits exist a chunk at a time. Products run in the dtype of `hidden`, or autocast's; all else in float32.

    Args:
        hidden: the LM's `[N, d]`.
        head: its head.
        reference: hidden states `[N, d']` of the LM that it is compared to, and that one's head; None: the same head.
        labels: `[N]` int64, negative where not compared.
    """
    base_head: Any = head if reference[1] is None else reference[1]
    assert is_plain(head, nn.Linear) and is_plain(base_head, nn.Linear)
    dtype = _dtype_of_products(hidden)
    base_hidden, is_compared = reference[0].to(dtype), labels >= 0
    cast = _aligned if _on_gpu(hidden) else Tensor.to
    base_weight: Tensor = cast(base_head.weight.detach(), dtype)
    base_bias = None if base_head.bias is None else cast(base_head.bias.detach(), dtype)

    def chunk_loss(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        base = F.linear(base_hidden[chunk], base_weight, base_bias)[:, : logits.shape[1]]
        return _divergence_(logits, base, is_compared[chunk])

    return _linear_loss(hidden.to(dtype), head.weight, head.bias, chunk_loss)[0]  # type: ignore[arg-type]


def _divergence_(logits: Tensor, base: Tensor, is_compared: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence of softmax(logits) `[N, V]` from softmax(base), `[N]`, and its gradient in place of the logits."""
    token_kl = logits.new_zeros(len(logits), dtype=torch.float32)
    for begin in range(0, len(logits), ROWS):
        rows = slice(begin, begin + ROWS)
        log_q, log_p = (each[rows].float().log_softmax(dim=-1) for each in (logits, base))
        p = log_p.exp()
        token_kl[rows] = (p * (log_p - log_q)).sum(dim=-1) * is_compared[rows]
        logits[rows] = (log_q.exp_() - p) * is_compared[rows, None]
    return logits, token_kl


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> tuple[Tensor, None]:
    """`linear_cross_entropy` by Liger-Kernel, which gives no token's own NLL; weight gradients add up in float32."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    dtype = _dtype_of_products(hidden)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with full_precision(hidden.device):
        nll_sum = liger_fused_linear_cross_entropy(
            hidden, weight, labels, bias, reduction="sum", accum_dtype=torch.float32
        )
    return nll_sum, None


LOSSES: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {"chunked": linear_cross_entropy, "liger": _liger}
"""Ways to compute `linear_cross_entropy`, by the name that `--loss-kernel` takes."""


def token_losses(inputs: Tensor, head: nn.Module | None, labels: Tensor, kernel: str) -> tuple[Tensor, Tensor | None]:
    """Summed and per-token cross-entropy of hidden states, or of logits that are there already.

    Args:
        inputs: `[N, d]` hidden states, or `[N, V]` logits where `head` is None.
        head: the LM's.
        labels: `[N]` int64, -100 where not scored.
        kernel: of `LOSSES`; used where the head is a plain linear layer, whose weight may be read.

    Returns:
        See `linear_cross_entropy`.

    Raises:
        InputError: labels that are neither tokens nor -100 (looked for on the CPU only).
    """
    if head is not None and is_plain(head, nn.Linear):
        _check_labels(labels, len(head.weight))  # type: ignore[arg-type]
        return LOSSES[kernel](inputs, head.weight, labels, head.bias)
    logits = inputs if head is None else head(inputs)
    _check_labels(labels, logits.shape[1])
    token_nll = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="none")
    return token_nll.sum(), token_nll.detach()


def _check_labels(labels: Tensor, vocabulary: int) -> None:
    if labels.device.type != "cpu" or not labels.numel():  # elsewhere looking would wait for the device
        return
    wrong = (labels != -100) & ((labels < 0) | (labels >= vocabulary))
    if wrong.any():
        raise InputError(
            f"labels: got {int(labels[wrong][0])}, expected tokens from 0 to {vocabulary - 1}, or -100 where not scored"
        )


def usable_loss(name: str, device: torch.device) -> str:
    """`name`, of `LOSSES`, checked to run here.

    Raises:
        InputError: it needs CUDA or a package that is not there.
    """
    if name == "liger" and device.type != "cuda":
        raise InputError(f"--loss-kernel liger: needs CUDA, and this is {device.type}; choose chunked")
    if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
        raise InputError("--loss-kernel liger: needs Liger-Kernel: pip install planlm[liger]")
    return name
