"""Tries an untrusted tokenizer.json in a process with limits.

Standalone: `models.tokenizer_trial` uses it, and it is copied into every Space folder. Started as a program,
`python tokenizer_worker.py FILE < texts.json`, it is that process: it prints {"cause": why the tokenizer cannot be
used, or null}, or dies at a limit. It imports nothing of this package, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

# CPU seconds. The largest vocabularies (256k tokens) load in two, and a text of a megabyte takes one more.
SECONDS = 30
# Bytes of address space. A vocabulary of 256k tokens takes 0.25 GB, of which a tenth is the interpreter.
MEMORY = 2 << 30
# Characters per character, or tokens per byte, that a text may grow to. Unicode's compatibility forms lengthen some
# characters 18 times, but texts hardly.
GROWTH = 16
# Characters and tokens beyond that, for the special tokens around a short text.
_ADDED = 256

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

_SLOW = f"it takes more than {SECONDS} seconds for a short text"
_LARGE = f"it takes more than {MEMORY / 1e9:.1f} GB of memory for a short text"
# What Rust's and Python's allocators write when they run out of memory.
_NO_MEMORY = ("memory allocation of", "MemoryError", "Cannot allocate memory", "bad_alloc")


def failure(file: Path, texts: Iterable[str] = ()) -> str | None:
    """The reason why a tokenizer.json cannot be used, or None if it can, or if there is no such file. A process with
    limits loads it, and encodes and decodes PROBE and the start of each text.
    """
    if not file.is_file():
        return None
    # Half of a surrogate pair cannot be passed on; where it matters, the text is refused.
    samples = [text[:SAMPLE_CHARACTERS].encode("utf-8", "replace").decode("utf-8") for text in texts]
    task = json.dumps([*PROBE, *filter(None, samples)])
    # -P: this file's folder is not searched for modules.
    command = [sys.executable, "-P", __file__, str(file)]
    try:
        # On Ctrl-C, `run` kills the process before it re-raises.
        done = subprocess.run(command, input=task.encode(), capture_output=True, timeout=_SLOWDOWN * SECONDS)
    except subprocess.TimeoutExpired:
        return _SLOW
    return _cause(done)


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


def limit() -> None:
    """Have the system end this process at the limits of CPU time and memory, where it supports them (macOS: not
    memory)."""
    try:
        import resource
    except ImportError:  # Windows
        return
    # The second number is the hard limit: SIGKILL, should SIGXCPU be ignored.
    limits = {resource.RLIMIT_CPU: (SECONDS, SECONDS + 1), resource.RLIMIT_AS: (MEMORY, MEMORY)}
    for which, (soft, hard) in (limits | {resource.RLIMIT_CORE: (0, 0)}).items():
        most = resource.getrlimit(which)[1]
        inside = most == resource.RLIM_INFINITY
        try:
            resource.setrlimit(which, (soft, hard) if inside else (min(soft, most), min(hard, most)))
        except (OSError, ValueError):  # not limited by this platform
            continue


def cause(path: str, texts: list[str]) -> str | None:
    """The reason why the tokenizer in the file cannot encode and decode these texts; None if it can."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(path)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        empty = True
        for text in texts:
            most = GROWTH * len(text) + _ADDED
            if tokenizer.normalizer is not None and len(tokenizer.normalizer.normalize_str(text)) > most:
                return f"its normalizer makes a text more than {GROWTH} times longer"
            ids = tokenizer.encode(text).ids
            if len(ids) > GROWTH * len(text.encode()) + _ADDED:
                return f"a text has more than {GROWTH} tokens per byte"
            empty &= not ids
            if len(tokenizer.decode(ids, skip_special_tokens=True)) > most:
                return f"its decoder makes a text more than {GROWTH} times longer"
        return "every text has no tokens" if empty else None
    # tokenizers raises plain Exception, and its PanicException is no Exception.
    except BaseException as error:
        return str(error).strip() or type(error).__name__


def main() -> None:
    # One thread: each of a pool reserves address space.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    texts = json.loads(sys.stdin.buffer.read())
    limit()
    print(json.dumps({"cause": cause(sys.argv[1], texts)}))


if __name__ == "__main__":
    main()
