"""Benchmarks of the fused plan operations: `kernels` (CPU), `gpu`, `traffic`; run with `python -m benchmarks.NAME`."""
