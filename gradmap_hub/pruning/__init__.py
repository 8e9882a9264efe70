"""Score, choose, remove, compensate, heal, verify: the numerics of depth pruning."""
