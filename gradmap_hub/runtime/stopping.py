"""Finds stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Withholds text that may be the beginning of a stop string; passes on the rest."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._held = ""
        self.met = False

    def add(self, piece: str) -> str:
        """Add a piece and return the text that became final, up to a stop string; `met` is true once one was found."""
        if self.met:
            return ""
        self._held += piece
        found = [position for text in self._stop if (position := self._held.find(text)) >= 0]
        if found:
            self.met = True
            final, self._held = self._held[: min(found)], ""
            return final
        keep = max((self._overlap(text) for text in self._stop), default=0)
        final, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return final

    def rest(self) -> str:
        """Return the withheld text; called after the last piece."""
        final, self._held = self._held, ""
        return final

    def _overlap(self, text: str) -> int:
        """Return the length of the longest suffix of the withheld text that is a proper prefix of `text`."""
        for size in range(min(len(text) - 1, len(self._held)), 0, -1):
            if self._held.endswith(text[:size]):
                return size
        return 0
