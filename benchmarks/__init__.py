"""Rankings side by side on the same rows: see `python -m benchmarks --help`."""
