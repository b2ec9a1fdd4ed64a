"""Benchmarks, run with `python -m benchmarks.NAME`.

`kernels` (CPU) and `gpu` time the plan operations, `step` a training step; `traffic` counts what the operations move on
CUDA and `compile_report` says what Triton makes of them, both without a GPU.
"""
