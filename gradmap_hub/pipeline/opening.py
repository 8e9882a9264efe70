"""Opens a finished folder before it is published, as a user who downloads it would."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gradmap_hub.errors import GradmapError, VerificationError
from gradmap_hub.layout import folder_sizes
from gradmap_hub.models.tokenizer_trial import TOKENIZER, try_tokenizer
from gradmap_hub.units import reason_of

_PROMPT = "Hello"
# Tokens of context, for which the KV cache is allocated.
_CONTEXT = 64


def check_opens(folder: Path) -> str:
    """Open a folder with the runtime and generate one token with its smallest ONNX file. Without ONNX files, ONNX
    Runtime or enough memory, open only its tokenizer and chat template. Returns the name of the opened file.

    Raises:
        VerificationError: the folder cannot be opened, or generates no token.
    """
    from gradmap_hub.runtime.artifacts import available_artifacts, free_memory, memory_needed

    free = free_memory()
    found = min(available_artifacts(folder_sizes(folder)), key=lambda graph: graph.bytes, default=None)
    if found is not None and free is not None and memory_needed(found) > free:
        found = None
    try:
        if found is not None and importlib.util.find_spec("onnxruntime") is not None:
            _write_token(folder, found.path)
            return found.path
        return _open_text(folder)
    except GradmapError as error:
        raise _unusable(folder, error.message) from error
    except Exception as error:  # ONNX Runtime's own have no common base class
        raise _unusable(folder, reason_of(error)) from error


def _write_token(folder: Path, artifact: str) -> None:
    from gradmap_hub.runtime.loading import load

    model = load(folder, artifact=artifact, provider="cpu", context=_CONTEXT)
    answer = model.start(model.encode(_PROMPT), max_tokens=1)
    while answer.finish_reason is None:
        answer.advance()


def _open_text(folder: Path) -> str:
    from gradmap_hub.runtime.prompting import ModelError, TextCodec

    try_tokenizer(folder, str(folder))
    try:
        TextCodec.from_folder(folder).encode_text(_PROMPT)
    except ModelError as error:
        raise _unusable(folder, str(error)) from error
    return TOKENIZER


def _unusable(folder: Path, reason: str) -> VerificationError:
    return VerificationError(
        f"{folder} cannot be opened as a user would open it: {reason.rstrip('.')}. Nothing was uploaded.",
        hint="Export it again with `gradmap-hub export`, or recreate the folder with `gradmap-hub prune`.",
    )
