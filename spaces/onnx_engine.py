"""A causal language model in ONNX Runtime, without torch.

Reads Optimum's "text-generation-with-past" exports and the weight-only 8- and 4-bit files with ONNX Runtime GenAI's
graph. The graph takes the new tokens and the keys and values of the earlier ones (past_key_values.*), and returns the
logits and the keys and values of all tokens (present.*).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from compare import Precision
from prompting import TEXT_FILES, ModelError, TextCodec, first_line, read_json
from tokenizer_worker import failure

# Suffix of the file next to the graph with weights that are too large for one file.
_DATA = "_data"

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def files_to_download(path: str, precision: Precision) -> list[str]:
    """The files of a model repository that this engine reads; `path` is the folder of the graph."""
    graph = f"{path}/{precision.file}" if path else precision.file
    return [graph, graph + _DATA, *TEXT_FILES]


def cpu_count() -> int:
    """The number of CPUs this process may use. A container often sees all CPUs of the machine but may use only a few;
    more threads than that wait for each other."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup, or cgroup v1
        pass
    return count


def find_graph(folder: Path, path: str, name: str) -> Path:
    """The graph in the folder `path`, in onnx/ (a model repository) or next to the tokenizer (an export)."""
    for candidate in (folder / path, folder / "onnx", folder):
        if (candidate / name).is_file():
            return candidate / name
    raise ModelError(f"{name} is missing.")


class OnnxModel:
    """One model: a session and its tokenizer."""

    def __init__(self, folder: Path, path: str, file: str) -> None:
        graph = find_graph(folder, path, file)
        text_folder = folder if (folder / "tokenizer.json").is_file() else graph.parent
        if cause := failure(text_folder / "tokenizer.json"):
            raise ModelError(f"its tokenizer cannot be used: {first_line(cause)}")
        self.text = TextCodec.from_folder(text_folder)
        config = read_json(text_folder / "config.json")
        context = config.get("max_position_embeddings")
        self.context_length: int | None = context if isinstance(context, int) else None

        options = ort.SessionOptions()
        options.intra_op_num_threads = cpu_count()
        # Two sessions share the CPUs in turn: threads spin during a step only, so an idle session uses no CPU.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        try:
            self.session = ort.InferenceSession(str(graph), sess_options=options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions have no common base class
            raise ModelError(f"{graph.name} could not be loaded: {first_line(error)}") from error
        self._check_inputs(graph.name, _head_size(config))

    def _check_inputs(self, graph: str, head_size: int) -> None:
        self.past: dict[str, tuple[list[int], type]] = {}
        plain = set()
        for value in self.session.get_inputs():
            if value.name.startswith("past_key_values."):
                if value.type not in _NUMPY_TYPES:
                    raise ModelError(f"{graph} has a cache of the unsupported type {value.type}.")
                # (batch, heads, tokens, head size); all but the heads may be symbolic.
                if len(value.shape) != 4 or not isinstance(value.shape[1], int):
                    raise ModelError(f"{graph} has a cache of the unsupported shape {value.shape}.")
                own = (1, value.shape[1], 0, head_size)
                shape = [
                    given if isinstance(given, int) else size for given, size in zip(value.shape, own, strict=True)
                ]
                self.past[value.name] = (shape, _NUMPY_TYPES[value.type])
            else:
                plain.add(value.name)
        unknown = plain - {"input_ids", "attention_mask", "position_ids"}
        if unknown or "input_ids" not in plain or not self.past:
            found = ", ".join(sorted(plain)) or "none"
            raise ModelError(f"{graph} is not a text generation graph with a cache (inputs: {found}).")
        self.plain_inputs = frozenset(plain)
        self.output_names = [value.name for value in self.session.get_outputs()]

    def start(self) -> OnnxDecoder:
        return OnnxDecoder(self)


class OnnxDecoder:
    """The decode loop of one answer. The KV cache stays in ONNX Runtime's memory and is never copied."""

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
        # present.3.key of this step becomes past_key_values.3.key of the next.
        self._cache = {name: outputs["present" + name.removeprefix("past_key_values")] for name in self._cache}
        self._length = end
        return outputs["logits"].numpy()[0, -1].astype(np.float32)


def _head_size(config: dict[str, Any]) -> int:
    size, heads = config.get("head_dim"), config.get("num_attention_heads")
    if isinstance(size, int):
        return size
    return int(config.get("hidden_size") or 0) // heads if isinstance(heads, int) and heads else 0


def load(folder: Path, path: str, precision: Precision) -> OnnxModel:
    """Load the model of a folder; `path` is the folder of the graph in it."""
    return OnnxModel(folder, path, precision.file)
