"""Runs a text-generation graph on the CPU, for the gate and the calibration; needs only numpy and onnxruntime.

Supports Optimum's graphs (with position_ids) and GenAI's (without); batch 1, no padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Past = dict[str, npt.NDArray[Any]]

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Session:
    """An ONNX Runtime session. `head_size` is used where the graph does not state the width of its cache."""

    def __init__(self, path: Path, head_size: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = {entry.name: entry for entry in self._session.get_inputs()}
        self._has_positions = "position_ids" in inputs
        self._past = {name: entry for name, entry in inputs.items() if name.startswith("past_key_values.")}
        self._head_size = head_size
        outputs = [entry.name for entry in self._session.get_outputs()]
        self._present = [name for name in outputs if name.startswith("present")]
        self._extra = [name for name in outputs if name != "logits" and not name.startswith("present")]

    @property
    def key_values(self) -> int:
        """The number of KV cache inputs, two per layer."""
        return len(self._past)

    @property
    def provider(self) -> str:
        return self._session.get_providers()[0]

    def empty(self) -> Past:
        """The empty cache: (1, heads, 0, width) each."""
        return {
            name: np.zeros((1, entry.shape[1], 0, self._width(entry)), _TYPES[entry.type])
            for name, entry in self._past.items()
        }

    def _width(self, entry: Any) -> int:
        return entry.shape[3] if isinstance(entry.shape[3], int) else self._head_size

    def step(self, ids: Ids, past: Past) -> tuple[npt.NDArray[np.float32], Past]:
        """Run `ids` (1, new) after `past`. Returns logits (1, new, vocabulary) and the extended cache."""
        logits, *present = self._run(["logits", *self._present], ids, past)
        return logits, {
            name.replace("present", "past_key_values"): value
            for name, value in zip(self._present, present, strict=True)
        }

    def logits(self, ids: Ids) -> npt.NDArray[np.float32]:
        """Run `ids` (1, tokens) without past. Returns logits (1, tokens, vocabulary)."""
        return self._run(["logits"], ids, self.empty())[0]

    def extras(self, ids: Ids) -> dict[str, npt.NDArray[np.float32]]:
        """Run `ids` (1, tokens) without past. Returns the outputs that are neither logits nor cache."""
        values = self._run(self._extra, ids, self.empty())
        return dict(zip(self._extra, values, strict=True))

    def _run(self, names: list[str], ids: Ids, past: Past) -> list[Any]:
        return list(self._session.run(names, self._feed(ids, past)))

    def _feed(self, ids: Ids, past: Past) -> dict[str, npt.NDArray[Any]]:
        before = next(iter(past.values())).shape[2] if past else 0
        length = before + ids.shape[1]
        feed: dict[str, npt.NDArray[Any]] = {"input_ids": ids, "attention_mask": np.ones((1, length), np.int64), **past}
        if self._has_positions:
            feed["position_ids"] = np.arange(before, length, dtype=np.int64)[None]
        return feed
