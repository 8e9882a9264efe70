"""Compares layer rankings on the same sequences; see `python -m benchmarks --help`."""
