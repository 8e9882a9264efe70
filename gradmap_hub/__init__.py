"""gradmap-hub: prune a causal language model by depth, measure it and publish it.

    from gradmap_hub import prune, heal, push, export, evaluate, sweep, load

The functions are documented in `gradmap_hub.api`; they and the heavy packages load when first used.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmap_hub.api import evaluate, export, heal, inspect, load, prune, publish, push, sweep
    from gradmap_hub.config import PruneMethod, PublishConfig
    from gradmap_hub.errors import GradmapError

try:
    __version__ = version("gradmap-hub")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0.0.0"

_EXPORTED = {
    **dict.fromkeys(
        ("evaluate", "export", "heal", "inspect", "load", "prune", "publish", "push", "sweep"), "gradmap_hub.api"
    ),
    "PruneMethod": "gradmap_hub.config",
    "PublishConfig": "gradmap_hub.config",
    "GradmapError": "gradmap_hub.errors",
}

__all__ = [
    "GradmapError",
    "PruneMethod",
    "PublishConfig",
    "__version__",
    "evaluate",
    "export",
    "heal",
    "inspect",
    "load",
    "prune",
    "publish",
    "push",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTED[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTED})
