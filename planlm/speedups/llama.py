"""Llama's norm, rotary embedding and gated activation in training on CUDA: torch's fused norm, Liger-Kernel's others.

transformers writes the families' files out of common parts: what has the source of Llama's norm, MLP or rotation
computes the same, whatever it is called. On other devices, without a backward pass, in compiled code and, but for the
norm, without Liger-Kernel they stay transformers' own, to the last bit.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama
from transformers.models.olmo import modeling_olmo

logger = logging.getLogger(__name__)


def replace_parts(lm: PreTrainedModel) -> None:
    """Have those of an LM's parts that are Llama's computed in fewer kernels, in place; weights keep their names."""
    norm, mlp = (_source(part.forward) for part in (modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP))
    for module in lm.modules():
        source = _source(type(module).forward)
        if source == norm:
            module.forward = MethodType(_norm, module)
        elif source == mlp and isinstance(module.act_fn, SiLUActivation | nn.SiLU):
            module.forward = MethodType(_mlp, module)
        _replace_rotation(sys.modules.get(type(module).__module__))


def _replace_rotation(file: Any) -> None:
    """Replace the rotation that a family's file calls by its name there, for all LMs of the process."""
    rotate = getattr(file, "apply_rotary_pos_emb", None)
    known = (modeling_llama.apply_rotary_pos_emb, modeling_olmo.apply_rotary_pos_emb)  # the latter keeps the dtype
    if rotate is None or hasattr(rotate, "__wrapped__") or _source(rotate) not in map(_source, known):
        return

    @functools.wraps(rotate)
    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        if unsqueeze_dim == 1 and _serves(q) and _serves(k) and _has_liger():
            from liger_kernel.ops import LigerRopeFunction

            return LigerRopeFunction.apply(q, k, cos, sin)  # what its function calls, after lines of what is not there
        return rotate(q, k, cos, sin, unsqueeze_dim)

    file.apply_rotary_pos_emb = rotated


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    """In place of `LlamaRMSNorm.forward`."""
    if _serves(hidden_states):
        dtype = torch.promote_types(hidden_states.dtype, module.weight.dtype)  # torch has no kernel for two
        x, weight = hidden_states.to(dtype), module.weight.to(dtype)
        return F.rms_norm(x, weight.shape, weight, module.variance_epsilon)
    plain: Tensor = type(module).forward(module, hidden_states)
    return plain


def _mlp(module: Any, x: Tensor) -> Tensor:
    """In place of `LlamaMLP.forward`."""
    if _serves(x) and _has_liger():
        from liger_kernel.ops import LigerSiLUMulFunction

        gated: Tensor = LigerSiLUMulFunction.apply(module.gate_proj(x), module.up_proj(x), 1.0, 1.0)
        found: Tensor = module.down_proj(gated)
        return found
    plain: Tensor = type(module).forward(module, x)
    return plain


def _serves(tensor: Tensor) -> bool:
    """Whether a tensor is on its way to a backward pass on CUDA."""
    return tensor.is_cuda and tensor.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


@functools.cache
def _has_liger() -> bool:
    """Whether it is installed; where it would serve and is not, a line says so."""
    if importlib.util.find_spec("liger_kernel") is not None:
        return True
    logger.warning("Liger-Kernel is not installed, with which this LM trains faster: pip install planlm[liger]")
    return False


@functools.cache
def _source(function: Callable[..., Any]) -> str | None:
    """What a function is made of; None where nobody knows."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return None
