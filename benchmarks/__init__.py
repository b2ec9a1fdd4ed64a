"""Benchmarks, run with `python -m benchmarks.NAME`.

`kernels` (CPU) and `gpu` time the plan operations, `step` a training step; `predict` says how long both
take on GPUs by a model and `compile_report` what Triton makes of the kernels, both without a GPU.
"""
