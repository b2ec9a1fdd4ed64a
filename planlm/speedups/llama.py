"""Llama's norm, rotary embedding and gated activation in training on CUDA: torch's fused norm, Liger-Kernel's others.

transformers writes the families' files out of common parts: what has the source of Llama's norm, MLP or rotation
computes the same, whatever it is called. On other devices, without a backward pass, compiled, traced and, but for the
norm, without Liger-Kernel they stay transformers' own.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama
from transformers.models.olmo import modeling_olmo

logger = logging.getLogger(__name__)

LEAST = (0, 8)
"""Version of Liger-Kernel."""

stand_in: Any = None
"""What serves in place of CUDA's kernels on every device: `counted.parts_as_on_cuda` sets it."""


def replace_parts(lm: PreTrainedModel) -> None:
    """Have those of an LM's parts that are Llama's computed in fewer kernels, in all LMs of their classes."""
    for part in {type(module) for module in lm.modules()}:
        if _is_same(part, modeling_llama.LlamaRMSNorm, "forward"):
            _replace(part, "forward", _norm)
        elif _is_same(part, modeling_llama.LlamaMLP, "forward"):
            _replace(part, "forward", _mlp)
        file, rotate = sys.modules.get(part.__module__), "apply_rotary_pos_emb"
        known = (modeling_llama, modeling_olmo)  # the latter keeps the dtype, as Liger-Kernel does
        if _is_same(file, modeling_llama, "rotate_half") and any(_is_same(file, one, rotate) for one in known):
            _replace(file, rotate, _rotated)


def _is_same(owner: Any, other: Any, name: str) -> bool:
    """Whether two functions of one name are made of the same source."""
    source = _source(getattr(owner, name, None))
    return source is not None and source == _source(getattr(other, name))


def _replace(owner: Any, name: str, by: Callable[..., Any]) -> None:
    """Put `by`, which is given what it replaces first, in the place of a function, once."""
    plain = getattr(owner, name)
    if hasattr(plain, "replaces"):
        return

    @functools.wraps(plain)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return by(plain, *args, **kwargs)

    replaced.replaces = plain  # type: ignore[attr-defined]
    setattr(owner, name, replaced)


def _norm(plain: Callable[..., Tensor], module: Any, hidden_states: Tensor) -> Tensor:
    """In place of `LlamaRMSNorm.forward`."""
    if not _serves(hidden_states):
        return plain(module, hidden_states)
    dtype = torch.promote_types(hidden_states.dtype, module.weight.dtype)  # torch has no kernel for two
    x, weight = hidden_states.to(dtype), module.weight.to(dtype)
    normed = _kernels().norm(x, weight, module.variance_epsilon)
    return normed.to(dtype)  # float32 under autocast


def _mlp(plain: Callable[..., Tensor], module: Any, x: Tensor) -> Tensor:
    """In place of `LlamaMLP.forward`."""
    if not (isinstance(getattr(module, "act_fn", None), SiLUActivation | nn.SiLU) and _serves(x) and _can_launch()):
        return plain(module, x)
    found: Tensor = module.down_proj(_kernels().gate(module.gate_proj(x), module.up_proj(x)))
    return found


def _rotated(plain: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    """In place of `apply_rotary_pos_emb`; q and k, which projections have made, are written over."""
    if not (unsqueeze_dim == 1 and _serves(q) and _serves(k) and _can_launch()):
        return plain(q, k, cos, sin, unsqueeze_dim)
    return _kernels().rotate(q, k, cos, sin)


def _kernels() -> Any:
    return stand_in or _OnCUDA


class _OnCUDA:
    """What computes the parts there."""

    @staticmethod
    def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, epsilon)

    @staticmethod
    def gate(a: Tensor, b: Tensor) -> Tensor:
        return _gated().apply(a, b, 1.0, 1.0)  # type: ignore[no-any-return]

    @staticmethod
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops import LigerRopeFunction

        with torch.cuda.device(q.device):  # it launches on the current one
            return LigerRopeFunction.apply(q, k, cos, sin)  # type: ignore[no-any-return]


@functools.cache
def _gated() -> Any:
    """Liger-Kernel's `silu(a) * b`, whose gradients are written over what was saved: autograd is told."""
    from liger_kernel.ops import LigerSiLUMulFunction

    class Gated(LigerSiLUMulFunction):  # type: ignore[misc]
        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            found = LigerSiLUMulFunction.backward(ctx, gradient)
            torch.autograd.graph.increment_version(found[:2])
            return found

    return Gated


def _serves(tensor: Tensor) -> bool:
    """Whether a tensor is on its way to a backward pass on CUDA."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    return (stand_in is not None or _is_on_cuda(tensor)) and tensor.requires_grad and torch.is_grad_enabled()


def _is_on_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _can_launch() -> bool:
    return stand_in is not None or _has_liger()


@functools.cache
def _has_liger() -> bool:
    """Whether it is installed; where it would serve and is not, a line says so."""
    try:
        version = importlib.metadata.version("liger_kernel")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found >= LEAST:
        return True
    what = f"Liger-Kernel {version} is older than {LEAST[0]}.{LEAST[1]}" if version else "Liger-Kernel is not installed"
    logger.warning("%s, with which this LM trains faster: pip install planlm[liger]", what)
    return False


@functools.cache
def _source(function: Any) -> str | None:
    """What a function is made of; None where nobody knows."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return None
