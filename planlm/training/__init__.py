"""Objectives, schedules, the loop and its checkpoints."""
