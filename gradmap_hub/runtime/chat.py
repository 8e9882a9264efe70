"""Chat prompts of a transformers tokenizer, rendered within the limits of `LimitedRenderer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradmap_hub.runtime.prompting import LimitedRenderer, ModelError
from gradmap_hub.runtime.text_model import PromptError

_RENDER = LimitedRenderer()  # its process starts with the first prompt


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> str:
    """Render messages ({"role", "content"}) with a tokenizer's chat template.

    The result is that of its `apply_chat_template`, which has no limits of time and memory.

    Args:
        tokenizer: of transformers.
        messages: the conversation.
        answer: whether the text ends where the model's answer begins (`add_generation_prompt`).

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
