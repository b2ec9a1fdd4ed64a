"""Rows, seeds and LMs from a YAML file to tables and curves, each cell in a process of its own."""
