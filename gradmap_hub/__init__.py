"""gradmap-hub: prune a causal language model by depth and publish it, with the numbers to show for it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("gradmap-hub")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0.0.0"
