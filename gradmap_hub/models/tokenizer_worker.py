"""The process in which somebody else's tokenizer.json is tried: `python tokenizer_worker.py FILE < texts.json`.

It prints {"cause": why the tokenizer cannot be used, or null}, or dies at a limit. Started as a file, and imports
nothing of this package, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import sys

# CPU seconds. The largest vocabularies (256k tokens) load in two, and a text of a megabyte takes one more.
SECONDS = 30
# Bytes of address space. A vocabulary of 256k tokens takes 0.25 GB, of which a tenth is the interpreter.
MEMORY = 2 << 30
# Characters per character, or tokens per byte, that a text may grow to. Unicode's compatibility forms lengthen some
# characters 18 times, but texts hardly.
GROWTH = 16
# Characters and tokens beyond that, for the special tokens around a short text.
_ADDED = 256


def limit() -> None:
    """Let the system end this process at the limits, where the platform can (on macOS it does not limit memory)."""
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
    """Why the tokenizer in the file cannot encode and decode these texts; None if it can."""
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
