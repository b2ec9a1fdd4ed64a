"""What makes a plain LM faster, or smaller: one room, with one door and one switch.

docs/speedups.md has what each piece brings. `apply` is the door; two pieces are called in the joint model's forward
pass. With the variable PLANLM_SPEEDUPS=0 all are off, and an LM computes as transformers has it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECES = ("activation", "attention", "cross-entropy", "llama")

ON = set() if os.environ.get("PLANLM_SPEEDUPS") == "0" else set(PIECES)
"""The pieces in use; the benchmark takes them out one by one."""


def apply(lm: PreTrainedModel) -> None:
    """Replace modules of an LM with faster ones that compute the same, in place; names and weights stay as they are."""
    from planlm.speedups import llama  # the rooms are cheap to import, and torch is not
    from planlm.speedups.lm import replace_activations

    if "activation" in ON:
        replace_activations(lm)
    if "llama" in ON:
        llama.replace_parts(lm)
