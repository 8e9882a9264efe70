"""Human-readable numbers."""

from __future__ import annotations

from collections.abc import Sequence


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def ranges(indices: Sequence[int]) -> str:
    """[3, 12, 13, 14] -> '3, 12-14'."""
    parts: list[str] = []
    start = previous = indices[0]
    for index in [*indices[1:], None]:
        if index is not None and index == previous + 1:
            previous = index
            continue
        parts.append(f"{start}" if start == previous else f"{start}-{previous}")
        if index is not None:
            start = previous = index
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """75 -> '75 s', 1860 -> '31 min', 7200 -> '2 h 0 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
