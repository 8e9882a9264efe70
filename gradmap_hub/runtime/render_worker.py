"""The process in which chat templates are rendered: a task per line on standard input, an answer per line on standard
output, both JSON. It ends when its input does, or at a limit.

Started as a file, without the rest of this package, so that it starts in a fifth of a second.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from pathlib import Path
from typing import Any

# CPU seconds per prompt: a template takes milliseconds for a long conversation.
SECONDS = 5
# Bytes of address space; the process takes 0.2 GB, and a conversation a few times its own size.
MEMORY = 1 << 30
# Characters of a prompt: more than any context length holds.
CHARACTERS = 32_000_000
_LONG = f"The model's chat template failed: it writes more than {CHARACTERS:,} characters for these messages."


def limit_memory() -> None:
    """Let allocations beyond MEMORY fail, where the platform can (macOS cannot)."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, OSError, ValueError):
        return


def limit_time(seconds: int) -> None:
    """Let the system end this process after so many CPU seconds, even if nobody waits for it; 0 takes that back."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)


def prompting() -> Any:
    """The module beside this file."""
    spec = importlib.util.spec_from_file_location("prompting", Path(__file__).with_name("prompting.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prompting"] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    module = prompting()
    limit_memory()
    for line in sys.stdin:
        task = json.loads(line)
        limit_time(SECONDS)
        try:
            text = module.render_chat(task["template"], task["messages"], task["tokens"])
            written = json.dumps({"text": text} if len(text) <= CHARACTERS else {"error": _LONG})
        except module.ModelError as error:
            written = json.dumps({"error": str(error)})
        limit_time(0)
        print(written, flush=True)


if __name__ == "__main__":
    main()
