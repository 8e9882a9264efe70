"""A causal language model in transformers, on the GPU if there is one.

Used if an export of the original must not be redistributed (gated, or the licence forbids it). Both models are then
loaded from the safetensors in their repositories. Same interface as onnx_engine.py.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import Precision
from prompting import ModelError, TextCodec, first_line, is_tokenizer_failure
from tokenizer_worker import failure
from transformers import AutoModelForCausalLM, AutoTokenizer

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def files_to_download(path: str, precision: Precision) -> list[str]:
    """Patterns for a model repository: safetensors and text only, no pickles and no Python code."""
    return [
        "config.json",
        "generation_config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
    ]


class TransformersModel:
    """One model: the weights and its tokenizer."""

    def __init__(self, folder: Path, precision: str = "float32") -> None:
        if precision not in _DTYPES:
            raise ModelError(f"compare.json asks for the unknown precision {precision!r}.")
        if cause := failure(folder / "tokenizer.json"):
            raise ModelError(f"its tokenizer cannot be used: {first_line(cause)}")
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            # Not every repository has tokenizer.json; transformers also converts the older formats.
            tokenizer = AutoTokenizer.from_pretrained(str(folder), use_fast=True, **local)
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=_DTYPES[precision], use_safetensors=True, **local
            )
        # transformers does not check what it looks up in these files, and tokenizers panics.
        except BaseException as error:
            if not isinstance(error, Exception) and not is_tokenizer_failure(error):
                raise
            raise ModelError(f"transformers could not load it: {first_line(error)}") from error
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError("it has no fast tokenizer.")
        self.text = TextCodec.with_tokenizer(folder, backend)
        # Only the logits of the last position are needed; not every architecture has the option.
        known = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"logits_to_keep": 1} if known else {}
        # On ZeroGPU, only decorated functions may use the GPU (zero_gpu.py).
        gpu = torch.cuda.is_available() and not os.environ.get("SPACES_ZERO_GPU")
        self.device = "cuda" if gpu else "cpu"
        self.model = model.to(self.device).eval()
        context = getattr(model.config, "max_position_embeddings", None)
        self.context_length: int | None = context if isinstance(context, int) else None

    def start(self) -> TransformersDecoder:
        return TransformersDecoder(self)


class TransformersDecoder:
    """The decode loop of one answer, with the model's own KV cache."""

    def __init__(self, model: TransformersModel) -> None:
        self._model = model
        self._cache: Any = None

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        ids = torch.tensor([list(token_ids)], device=self._model.device)
        output = self._model.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **self._model.options)
        self._cache = output.past_key_values
        # Copying the logits to the CPU waits for the GPU, so the measured time covers the whole step.
        return output.logits[0, -1].float().cpu().numpy()


def load(folder: Path, path: str, precision: Precision) -> TransformersModel:
    """Load the model of a folder; `path` is for ONNX graphs and is ignored here."""
    return TransformersModel(folder, precision.name)
