"""The simulated build of a Space. Nothing runs: each runtime request advances the build."""

from dataclasses import dataclass, replace
from typing import Literal

Stage = Literal["BUILDING", "APP_STARTING", "RUNNING", "BUILD_ERROR", "PAUSED"]


@dataclass(frozen=True)
class SpaceBuild:
    """The build of one commit.

    Args:
        polls: the number of runtime requests before the final stage. The first half (all, if ``error`` is set)
            returns BUILDING, the rest APP_STARTING.
        error: the build ends with BUILD_ERROR and this message instead of RUNNING.
        commit: the commit that is built.
        seen: the number of runtime requests so far, at most ``polls``.
        paused: whether the owner has paused the Space.
    """

    polls: int = 2
    error: str | None = None
    commit: str | None = None
    seen: int = 0
    paused: bool = False

    @property
    def stage(self) -> Stage:
        if self.paused:
            return "PAUSED"
        if self.error is not None:
            return "BUILDING" if self.seen < self.polls else "BUILD_ERROR"
        if self.seen < self._building:
            return "BUILDING"
        return "APP_STARTING" if self.seen < self.polls else "RUNNING"

    @property
    def _building(self) -> int:
        return (self.polls + 1) // 2

    def of(self, commit: str) -> "SpaceBuild":
        """The build of this commit; a new commit restarts the build."""
        return self if commit == self.commit else replace(self, commit=commit, seen=0)

    def polled(self) -> "SpaceBuild":
        """The build after one more runtime request."""
        return replace(self, seen=min(self.seen + (not self.paused), self.polls))

    def restarted(self, rebuild: bool) -> "SpaceBuild":
        """The build after a restart: from the built image, or from scratch if ``rebuild`` is set or the build fails."""
        seen = 0 if rebuild or self.error is not None else min(self.seen, self._building)
        return replace(self, seen=seen, paused=False)
