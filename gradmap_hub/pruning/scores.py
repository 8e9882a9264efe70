"""The scores of the layers of a model: numbers only, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerScores:
    """One value per layer, in the order of `layers` (indices); low = unimportant. See `scoring` for the formulas.

    `gradient` and `taylor` are empty if the gradients of the weights were not computed. `distance` and `cost` are
    (layers + 1) x (layers + 1): entry (i, j) belongs to the block of layers at positions i to j - 1, and `cost` is 0 on
    and below its diagonal. `loss`: of the original over `rows` sequences, in nats per token.
    """

    layers: list[int]
    gradient: list[float]
    taylor: list[float]
    distance: list[list[float]]
    shift: list[float]
    gate: list[float]
    cost: list[list[float]]
    loss: float
    rows: int = 0

    @property
    def influence(self) -> list[float]:
        """Block influence of each layer."""
        return self.windows(1)

    def windows(self, size: int) -> list[float]:
        """1 - mean cosine across each `size` consecutive layers, by the position of the first."""
        return [self.distance[start][start + size] for start in range(len(self.layers) - size + 1)]
