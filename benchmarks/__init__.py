"""Benchmarks of batchnorm_ext: run as ``python -m benchmarks`` from the repository root."""
