"""Where the command line prints: results on stdout, as JSON or for a reader; progress and errors on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType

stdout = Console(soft_wrap=True)
stderr = Console(stderr=True, soft_wrap=True)


@dataclass(frozen=True)
class Result:
    """What a command returns.

    `json`: the object that --json prints. `view`: lines of rich markup and tables for a reader, printed in order; a
    generator is only run if they are printed. External text in it is escaped.
    """

    json: Mapping[str, Any]
    view: Iterable[RenderableType] = ()


def emit(result: Result, as_json: bool) -> None:
    """Print a result on stdout, once: its JSON object, or its view."""
    if as_json:
        print(json.dumps(result.json, indent=2, ensure_ascii=False, allow_nan=False), flush=True)
        return
    for part in result.view:
        stdout.print(part, highlight=False if isinstance(part, str) else None)
