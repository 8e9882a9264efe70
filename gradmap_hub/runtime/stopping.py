"""Stop strings over text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Hands text on as far as it can no longer be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._held = ""
        self.met = False

    def add(self, piece: str) -> str:
        """What of the text so far has become final; `met` tells whether a stop string was found in it."""
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
        """What was held back, when nothing more will come."""
        final, self._held = self._held, ""
        return final

    def _overlap(self, text: str) -> int:
        """Length of the longest end of what is held that begins `text`."""
        for size in range(min(len(text) - 1, len(self._held)), 0, -1):
            if self._held.endswith(text[:size]):
                return size
        return 0
