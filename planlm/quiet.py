"""Keeping libraries' chatter off the screen."""

from __future__ import annotations

import logging
import os
import warnings


def silence_libraries() -> None:
    """Keep libraries' warnings and bars off the screen unless PLANLM_VERBOSE is set; PlanLM shows its own progress."""
    if os.environ.get("PLANLM_VERBOSE"):
        return
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(variable, "1")
