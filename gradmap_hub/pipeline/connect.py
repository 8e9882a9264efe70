"""The Hub and the reporter of a command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradmap_hub.distributed import check_alone
from gradmap_hub.progress import Reporter, SilentReporter

if TYPE_CHECKING:
    from gradmap_hub.hub.client import Hub


def connect(hub: Hub | None, reporter: Reporter | None) -> tuple[Hub, Reporter]:
    """The given Hub and reporter; by default the Hub of the environment and a silent reporter. Commands
    begin here.

    Returns:
        The Hub, which reports its waits, and the reporter.

    Raises:
        UsageError: several processes were started for the work of one.
    """
    from gradmap_hub.hub.client import Hub

    check_alone()
    reporter = reporter or SilentReporter()
    return (hub or Hub()).reporting(reporter), reporter
