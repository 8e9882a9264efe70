"""Lets a model continue the last message of a chat."""

from __future__ import annotations

from gradmap_hub.runtime.prompting import ModelError


def cut_after(rendered: str, content: str) -> str:
    """Return a rendered chat up to the end of its last message, as transformers' `continue_final_message` does.

    `content`: the last message. A template may strip messages; white space at the end of `content` stays only if the
    template keeps it.

    Raises:
        ModelError: the template does not write this message, or the message is empty.
    """
    core = content.strip()
    start = rendered.rfind(core) if core else -1
    if start < 0:
        raise ModelError("The last message cannot be continued: it is empty, or the chat template changes it.")
    whole = content.lstrip()
    kept = whole if rendered.startswith(whole, start) else core
    return rendered[: start + len(kept)]
