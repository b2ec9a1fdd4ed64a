"""Perplexity, planner metrics and the significance of differences."""
