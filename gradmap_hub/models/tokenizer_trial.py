"""Tries somebody else's tokenizer.json in a process with limits, before this process loads it.

A tokenizer is a program: its regular expressions may take exponential time, its normalizers may multiply a text until
the machine has no memory left, and an error in it may abort the process that loads it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gradmap_hub.errors import SourceError
from gradmap_hub.models import tokenizer_worker
from gradmap_hub.units import reason_of

TOKENIZER = "tokenizer.json"
# Characters at the start of each text that are tried: enough to meet its script and its markup, and encoded at once.
SAMPLE_CHARACTERS = 100_000
# Wall-clock seconds per CPU second that the worker may use, on a machine that other work keeps busy.
_SLOWDOWN = 4
# Every kind of character that pre-tokenizers tell apart, and runs on which backtracking shows.
PROBE = (
    "The river's 12,345 mills (1987) cost \u20ac3.50!\n\n\tdef f(x):\n        return x\r\n",
    "\u00e4\u00f1\u0301 \u0436\u0443\u0440 \u6a21\u578b \u0627\u0644 \ud55c \U0001f600\u200d\U0001f527 \ufb01 \x00\x7f",
    *(character * 64 + ending for character in "aA0 !\n_" for ending in ("", "!")),
)


def try_tokenizer(folder: Path, name: str, texts: Iterable[str] = ()) -> None:
    """Load the tokenizer.json of a folder, if it has one, and encode and decode a probe and the start of each text.

    Args:
        name: What an error calls the model.

    Raises:
        SourceError: it fails, or exceeds the limits of time and memory of `tokenizer_worker`.
    """
    file = folder / TOKENIZER
    if not file.is_file():
        return
    # Half of a surrogate pair cannot be passed on; where it matters, the text is refused.
    samples = [text[:SAMPLE_CHARACTERS].encode("utf-8", "replace").decode("utf-8") for text in texts]
    task = json.dumps([*PROBE, *filter(None, samples)])
    command = [sys.executable, "-P", tokenizer_worker.__file__, str(file)]
    try:
        # On Ctrl-C, `run` kills the process before it re-raises.
        done = subprocess.run(
            command, input=task.encode(), capture_output=True, timeout=_SLOWDOWN * tokenizer_worker.SECONDS
        )
    except subprocess.TimeoutExpired:
        raise unusable(name, _SLOW) from None
    cause = _cause(done)
    if cause is not None:
        raise unusable(name, cause)


def unusable(name: str, cause: BaseException | str) -> SourceError:
    """The error of a tokenizer that fails for this cause: an exception, or words."""
    return SourceError(
        f"The tokenizer of {name} cannot be used: {TOKENIZER}: {reason_of(cause)}",
        hint="Replace tokenizer.json with the file of the model's own repository.",
    )


def is_failure(error: BaseException) -> bool:
    """Whether the tokenizers library raised this: a plain Exception, or a panic of its Rust code, which is not one."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


@contextmanager
def failures_named(name: str) -> Iterator[None]:
    """Turn a failure of the tokenizers library into the error of `unusable`.

    Raises:
        SourceError: the library failed.
    """
    try:
        yield
    except BaseException as error:
        if not is_failure(error):
            raise
        raise unusable(name, error) from error


_SLOW = f"it takes more than {tokenizer_worker.SECONDS} seconds for a short text"
_LARGE = f"it takes more than {tokenizer_worker.MEMORY / 1e9:.1f} GB of memory for a short text"
# What the Rust and the Python allocator write when memory ends.
_NO_MEMORY = ("memory allocation of", "MemoryError", "Cannot allocate memory", "bad_alloc")


def _cause(done: subprocess.CompletedProcess[bytes]) -> str | None:
    said = done.stderr.decode("utf-8", "replace")
    if any(words in said for words in _NO_MEMORY):
        return _LARGE
    try:
        return json.loads(done.stdout)["cause"]
    except ValueError:
        pass
    if done.returncode in (-_signal("SIGXCPU"), -_signal("SIGKILL")):
        return _SLOW
    if done.returncode == -_signal("SIGSEGV"):  # a stack that cannot grow, such as of deep recursion
        return "it makes the tokenizers library crash"
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else f"it ends the process that loads it (status {done.returncode})"


def _signal(name: str) -> int:
    return int(getattr(signal, name, 0)) or sys.maxsize
