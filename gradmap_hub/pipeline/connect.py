"""The Hub and the reporter of a command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradmap_hub.distributed import check_alone
from gradmap_hub.progress import Reporter, SilentReporter

if TYPE_CHECKING:
    from gradmap_hub.hub.client import Hub


def connect(hub: Hub | None, reporter: Reporter | None) -> tuple[Hub, Reporter]:
    """The Hub and the reporter of a command; every command that may use the Hub calls this first.

    Args:
        hub: By default the Hub of the environment (HF_ENDPOINT, HF_TOKEN).
        reporter: By default a silent one.

    Returns:
        The Hub, which notes its waits to the reporter, and the reporter.

    Raises:
        UsageError: several processes were started for a command that runs in one.
    """
    from gradmap_hub.hub.client import Hub

    check_alone()
    reporter = reporter or SilentReporter()
    return (hub or Hub()).reporting(reporter), reporter
