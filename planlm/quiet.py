"""Keeping libraries' chatter off the screen, and PlanLM's own lines on it."""

from __future__ import annotations

import logging
import os
import warnings

_SWITCHES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TORCH_LOGS": "-all",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def silence_libraries() -> None:
    """Keep libraries' warnings and bars off the screen unless PLANLM_VERBOSE is set; PlanLM shows its own progress.

    Each by its own switch and never all at once: what PlanLM has to say ("the eager reference runs instead"), and what
    transformers says of weights that do not fit, reach the screen. Of several processes the first one speaks.
    """
    if os.environ.get("PLANLM_VERBOSE"):
        return
    for variable, value in _SWITCHES.items():
        os.environ.setdefault(variable, value)
    logging.getLogger().setLevel(logging.ERROR)  # of all that set none of their own
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("planlm").setLevel(logging.WARNING if first else logging.ERROR)
    weights = logging.getLogger("transformers.modeling_utils")
    weights.setLevel(logging.WARNING)
    weights.addFilter(_is_of_weights)
    warnings.simplefilter("ignore")


def _is_of_weights(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or "LOAD REPORT" in record.getMessage()
