"""The Hub and the reporter that a command works with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradmap_hub.progress import Reporter, SilentReporter

if TYPE_CHECKING:
    from gradmap_hub.hub.client import Hub


def connect(hub: Hub | None, reporter: Reporter | None) -> tuple[Hub, Reporter]:
    """The Hub and the reporter given, else the Hub that the environment configures and silence."""
    from gradmap_hub.hub.client import Hub

    reporter = reporter or SilentReporter()
    return (hub or Hub()).reporting(reporter), reporter
