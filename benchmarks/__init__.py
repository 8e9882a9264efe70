"""Benchmarks of pruning, healing, inference and memory; see `python -m benchmarks --help` and the other modules."""
