"""Benchmarks: one file per operation, named after it; `python -m benchmarks --help`."""
