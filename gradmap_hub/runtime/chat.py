"""Chat prompts of a tokenizer of transformers, rendered with the limits of time and memory that the runtime has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradmap_hub.runtime.prompting import LimitedRenderer, ModelError
from gradmap_hub.runtime.text_model import PromptError

_RENDER = LimitedRenderer()  # its process starts with the first prompt


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> str:
    """Messages ({"role", "content"}) in the chat template of a tokenizer, as its `apply_chat_template` writes them,
    which has no limits.

    Args:
        answer: End where the model's answer begins.

    Raises:
        PromptError: the tokenizer has no default template, or the template fails or exceeds a limit.
    """
    template = tokenizer.chat_template
    if isinstance(template, Mapping):  # several by name
        template = template.get("default")
    if not isinstance(template, str):
        raise PromptError("The model has no default chat template.")
    try:
        return _RENDER(template, messages, tokenizer.special_tokens_map, {"add_generation_prompt": answer})
    except ModelError as error:
        raise PromptError(str(error)) from error
