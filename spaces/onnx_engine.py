"""A causal language model in ONNX Runtime, without torch.

The files are those that Optimum exports for "text-generation-with-past": one graph that takes the new
tokens and the keys and values of the earlier ones (past_key_values.*), and returns logits and the keys
and values of all (present.*).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from prompting import TEXT_FILES, ModelError, TextCodec, read_json

MODEL_FILES = ("model.onnx", "model.onnx_data")

_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def files_to_download(path: str) -> list[str]:
    """The files of a model repository that this engine reads; `path` is the folder of the graph."""
    prefix = f"{path}/" if path else ""
    return [prefix + name for name in MODEL_FILES] + list(TEXT_FILES)


def cpu_count() -> int:
    """The processors this process may use, which in a container is often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_graph(folder: Path, path: str) -> Path:
    """model.onnx in the folder named, in onnx/ (a model repository) or beside the tokenizer (an export)."""
    for candidate in (folder / path, folder / "onnx", folder):
        if (candidate / "model.onnx").is_file():
            return candidate / "model.onnx"
    raise ModelError("model.onnx is missing.")


class OnnxModel:
    """One model: a session and its tokenizer."""

    def __init__(self, folder: Path, path: str = "") -> None:
        graph = find_graph(folder, path)
        text_folder = folder if (folder / "tokenizer.json").is_file() else graph.parent
        self.text = TextCodec.from_folder(text_folder)
        context = read_json(text_folder / "config.json").get("max_position_embeddings")
        self.context_length: int | None = context if isinstance(context, int) else None

        options = ort.SessionOptions()
        options.intra_op_num_threads = cpu_count()
        # Two sessions share the processors in turn: an idle one must not keep them busy by spinning.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self.session = ort.InferenceSession(str(graph), sess_options=options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions have no common base class
            raise ModelError(f"{graph.name} could not be loaded: {error}") from error
        self._check_inputs()

    def _check_inputs(self) -> None:
        self.past: dict[str, tuple[list[int], type]] = {}
        plain = set()
        for value in self.session.get_inputs():
            if value.name.startswith("past_key_values."):
                if value.type not in _NUMPY_TYPES:
                    raise ModelError(f"model.onnx keeps its cache as {value.type}, which is not supported.")
                # Fixed sizes are numbers. Of the open ones the batch is 1, and no token is past yet.
                shape = [d if isinstance(d, int) else int("batch" in str(d)) for d in value.shape]
                self.past[value.name] = (shape, _NUMPY_TYPES[value.type])
            else:
                plain.add(value.name)
        unknown = plain - {"input_ids", "attention_mask", "position_ids"}
        if unknown or "input_ids" not in plain or not self.past:
            found = ", ".join(sorted(plain)) or "none"
            raise ModelError(f"model.onnx is not a text generation graph with a cache (inputs: {found}).")
        self.plain_inputs = frozenset(plain)
        self.output_names = [value.name for value in self.session.get_outputs()]

    def start(self) -> OnnxDecoder:
        return OnnxDecoder(self)


class OnnxDecoder:
    """The decode loop of one answer. The cache stays in ONNX Runtime's memory and is never copied."""

    def __init__(self, model: OnnxModel) -> None:
        self._model = model
        self._length = 0
        self._cache = {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=kind))
            for name, (shape, kind) in model.past.items()
        }

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        end = self._length + len(token_ids)
        plain = {
            "input_ids": np.array([token_ids], dtype=np.int64),
            "attention_mask": np.ones((1, end), dtype=np.int64),
            "position_ids": np.arange(self._length, end, dtype=np.int64)[None, :],
        }
        feeds = {name: ort.OrtValue.ortvalue_from_numpy(plain[name]) for name in self._model.plain_inputs}
        values = self._model.session.run_with_ort_values(self._model.output_names, {**feeds, **self._cache})
        outputs = dict(zip(self._model.output_names, values, strict=True))
        # present.3.key of this step is past_key_values.3.key of the next.
        self._cache = {name: outputs["present" + name.removeprefix("past_key_values")] for name in self._cache}
        self._length = end
        return outputs["logits"].numpy()[0, -1].astype(np.float32)


def load(folder: Path, path: str = "", precision: str = "float32") -> OnnxModel:
    """Load the model of a folder. The precision is already in the file; the other engine needs it."""
    return OnnxModel(folder, path)
