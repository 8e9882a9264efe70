"""How far a Space has come. Nothing runs here: being asked is what makes the build advance."""

from dataclasses import dataclass, replace
from typing import Literal

Stage = Literal["BUILDING", "APP_STARTING", "RUNNING", "BUILD_ERROR", "PAUSED"]


@dataclass(frozen=True)
class SpaceBuild:
    """The build of one commit.

    Args:
        polls: how many times the runtime is asked for before the last stage is reached. The first half of them
            (all, where it fails) finds BUILDING, the rest APP_STARTING.
        error: the build ends with BUILD_ERROR and this message, instead of RUNNING.
        commit: what is built.
        seen: how many times the runtime was asked for.
        paused: the owner has paused the Space.
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
        """The build of this commit, which starts anew where another one was built before."""
        return self if commit == self.commit else replace(self, commit=commit, seen=0)

    def polled(self) -> "SpaceBuild":
        """One step further."""
        return replace(self, seen=min(self.seen + (not self.paused), self.polls))

    def restarted(self, rebuild: bool) -> "SpaceBuild":
        """Running again, from the image that was built, or (also if that failed) from a new one."""
        seen = 0 if rebuild or self.error is not None else min(self.seen, self._building)
        return replace(self, seen=seen, paused=False)
