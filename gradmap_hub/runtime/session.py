"""A text generation graph in ONNX Runtime, run step by step with a KV cache.

Two kinds of graph are supported. Optimum's "text-generation-with-past" returns the keys and values of all tokens at
every step; they stay in ONNX Runtime's memory and are the input of the next step. Graphs with GroupQueryAttention (made
by ONNX Runtime GenAI's model builder) update their input buffers in place; these are allocated once, at full capacity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort

from gradmap_hub.errors import GradmapError, MissingExtra, SourceError
from gradmap_hub.runtime.prefixes import KeysValues, tokens_of, write_into

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_PAST, _PRESENT = "past_key_values.", "present."
_PLAIN = frozenset({"input_ids", "attention_mask", "position_ids"})
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Steps(Protocol):
    """The model with the KV cache of one text."""

    @property
    def length(self) -> int:
        """How many tokens the cache holds."""
        ...

    def run(self, token_ids: Sequence[int]) -> np.ndarray:
        """Append the tokens; return the logits after each, (tokens, vocabulary) in the graph's dtype."""
        ...

    def kept(self, start: int, stop: int) -> KeysValues:
        """Return the keys and values of tokens `start` to `stop` (exclusive): (heads, tokens, head size) for each cache
        tensor, valid until the next step. Only if the session is `readable`."""
        ...

    def fill(self, parts: Sequence[KeysValues]) -> None:
        """Fill an empty cache with what `kept` returned, one part after the other. Only if `readable`."""
        ...

    def close(self) -> None:
        """Free the cache. Called once."""
        ...


class Session:
    """A loaded graph. `provider`: ONNX Runtime execution provider; `threads`: threads per step; `head_size`: of keys
    and values, used if the graph leaves this dimension dynamic.

    Raises:
        SourceError: the file cannot be loaded, or is not a text generation graph with a KV cache.
        GradmapError: the provider is not usable.
    """

    def __init__(self, graph: Path, provider: str, threads: int, head_size: int) -> None:
        self._head_size = head_size
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads spin within a step, which is faster than waking them, and stop spinning after it, so that an idle
        # server uses no CPU.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(graph), sess_options=options, providers=_providers(provider))
        except Exception as error:  # onnxruntime's own exceptions have no common base class
            raise SourceError(f"{graph.name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
        self.provider: str = self._session.get_providers()[0]
        if self.provider != provider:
            # Without working CUDA, onnxruntime-gpu falls back silently.
            raise GradmapError(
                f"{provider} is not usable on this machine: ONNX Runtime fell back to {self.provider}.",
                hint="Check the driver and the CUDA libraries, or use --provider cpu.",
            )
        self.device = "cuda" if provider == CUDA else "cpu"
        self.past: dict[str, tuple[list[int | str], type]] = {}
        plain = set()
        for value in self._session.get_inputs():
            if value.name.startswith(_PAST):
                if value.type not in _NUMPY_TYPES:
                    raise SourceError(f"{graph.name} has a KV cache of dtype {value.type}, which is not supported.")
                self.past[value.name] = (list(value.shape), _NUMPY_TYPES[value.type])
            else:
                plain.add(value.name)
        if "input_ids" not in plain or plain - _PLAIN or not self.past:
            found = ", ".join(sorted(plain)) or "none"
            raise SourceError(f"{graph.name} is not a text generation graph with a KV cache (inputs: {found}).")
        self.plain = frozenset(plain)
        self.presents = [value.name for value in self._session.get_outputs() if value.name.startswith(_PRESENT)]
        if len(self.presents) != len(self.past):
            counts = f"{len(self.past)} cache inputs, {len(self.presents)} cache outputs"
            raise SourceError(f"{graph.name} is not supported: {counts}.")
        self.shares_buffer = _shares_buffer(self._session)

    def start(self, capacity: int) -> Steps:
        """Return `Steps` with an empty cache. `capacity`: how many tokens it must hold."""
        return _SharedBuffer(self, capacity) if self.shares_buffer else _Growing(self)

    @property
    def batches(self) -> bool:
        """Whether one step can cover texts of different lengths (see pool.py)."""
        open_ended = all(not isinstance(shape[0], int) for shape, _ in self.past.values())
        return self.shares_buffer and self.device == "cpu" and "position_ids" not in self.plain and open_ended

    @property
    def readable(self) -> bool:
        """Whether `Steps.kept` and `Steps.fill` work: on a CPU only."""
        return self.device == "cpu"

    def binding(self) -> ort.IOBinding:
        return self._session.io_binding()

    def run(self, binding: ort.IOBinding) -> None:
        """Run the graph once.

        Raises:
            GradmapError: ONNX Runtime failed.
        """
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's own exceptions have no common base class
            raise GradmapError(f"ONNX Runtime failed: {' '.join(str(error).split())[:300]}") from error

    def feeds(self, token_ids: Sequence[int], length: int) -> dict[str, np.ndarray]:
        """Return the inputs (int64, batch size 1) of a step after `length` tokens, without the cache."""
        end = length + len(token_ids)
        every = {
            "input_ids": np.array([token_ids], dtype=np.int64),
            "attention_mask": np.ones((1, end), dtype=np.int64),
            "position_ids": np.arange(length, end, dtype=np.int64)[None, :],
        }
        return {name: every[name] for name in self.plain}

    def cache_shape(self, name: str, rows: int, tokens: int) -> list[int]:
        """Return the shape of a cache tensor: (rows, heads, tokens, head size).

        Raises:
            SourceError: the graph declares a shape without a fixed number of heads, or not of four dimensions.
        """
        shape, _ = self.past[name]
        # A graph may fix every dimension except the tokens.
        if len(shape) != 4 or not isinstance(shape[1], int):
            raise SourceError(f"The cache input {name} has an unsupported shape: {shape}.")
        own = (rows, shape[1], tokens, self._head_size)
        return [given if isinstance(given, int) else size for given, size in zip(shape, own, strict=True)]

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values per token."""
        sizes = (
            math.prod(self.cache_shape(name, 1, 1)) * np.dtype(kind).itemsize for name, (_, kind) in self.past.items()
        )
        return sum(sizes)

    def empty(self, name: str, tokens: int) -> ort.OrtValue:
        """Return a zero cache tensor for `tokens` tokens, batch size 1."""
        zeros = np.zeros(self.cache_shape(name, 1, tokens), dtype=self.past[name][1])
        return ort.OrtValue.ortvalue_from_numpy(zeros, self.device, 0)

    @staticmethod
    def present_of(past: str) -> str:
        """Return the name of the output that matches a cache input."""
        return _PRESENT + past.removeprefix(_PAST)


class _Growing:
    """The cache outputs of a step are the cache inputs of the next."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.length = 0
        self._cache = {name: session.empty(name, 0) for name in session.past}

    def run(self, token_ids: Sequence[int]) -> np.ndarray:
        session = self._session
        binding = session.binding()
        for name, value in session.feeds(token_ids, self.length).items():
            binding.bind_cpu_input(name, value)
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in session.presents:
            binding.bind_output(name, session.device)
        session.run(binding)
        logits, *presents = binding.get_outputs()
        values = dict(zip(session.presents, presents, strict=True))
        self._cache = {name: values[session.present_of(name)] for name in self._cache}
        self.length += len(token_ids)
        return logits.numpy()[0]

    def kept(self, start: int, stop: int) -> KeysValues:
        return [value.numpy()[0, :, start:stop] for value in self._cache.values()]

    def fill(self, parts: Sequence[KeysValues]) -> None:
        for name, tensors in zip(self._cache, zip(*parts, strict=True), strict=True):
            whole = np.ascontiguousarray(np.concatenate(tensors, axis=1)[None])
            self._cache[name] = ort.OrtValue.ortvalue_from_numpy(whole, self._session.device, 0)
        self.length = tokens_of(parts)

    def close(self) -> None:
        self._cache = {}


class _SharedBuffer:
    """Cache inputs and outputs share one buffer, bound once."""

    def __init__(self, session: Session, capacity: int) -> None:
        self._session = session
        self.length = 0
        self._binding = session.binding()
        # get_outputs() returns outputs in the order they were bound.
        self._binding.bind_output("logits", "cpu")
        self._buffers = {name: session.empty(name, capacity) for name in session.past}
        for name, buffer in self._buffers.items():
            self._binding.bind_ortvalue_input(name, buffer)
            self._binding.bind_ortvalue_output(session.present_of(name), buffer)

    def run(self, token_ids: Sequence[int]) -> np.ndarray:
        binding = self._binding
        for name, value in self._session.feeds(token_ids, self.length).items():
            binding.bind_cpu_input(name, value)
        # Bound again for every step: a bound output keeps its shape.
        binding.bind_output("logits", "cpu")
        self._session.run(binding)
        self.length += len(token_ids)
        logits = binding.get_outputs()[0]
        return logits.numpy()[0]

    def kept(self, start: int, stop: int) -> KeysValues:
        return [buffer.numpy()[0, :, start:stop] for buffer in self._buffers.values()]

    def fill(self, parts: Sequence[KeysValues]) -> None:
        for buffer, tensors in zip(self._buffers.values(), zip(*parts, strict=True), strict=True):
            whole = buffer.numpy()
            write_into(whole[0], tensors)
            buffer.update_inplace(whole)
        self.length = tokens_of(parts)

    def close(self) -> None:
        self._buffers = {}


def _shares_buffer(session: ort.InferenceSession) -> bool:
    """Whether cache inputs and outputs may share a buffer; our exports state it in the graph's metadata."""
    return session.get_modelmeta().custom_metadata_map.get("past_present_share_buffer") == "true"


def _providers(provider: str) -> list[str]:
    return [provider] if provider == CPU else [provider, CPU]


def provider_named(wanted: str) -> str:
    """Return the execution provider for `auto`, `cpu`, `cuda` or a full provider name.

    Raises:
        MissingExtra: CUDA was requested, but this build of ONNX Runtime does not support it.
        GradmapError: the provider is not supported.
    """
    there = ort.get_available_providers()
    if wanted == "auto":
        # GPU builds list CUDA even on machines without a GPU.
        return CUDA if CUDA in there and _has_gpu() else CPU
    name = {"cpu": CPU, "cuda": CUDA}.get(wanted.lower(), wanted)
    if name not in (CPU, CUDA):
        raise GradmapError(f"The execution provider {wanted!r} is not supported; use cpu or cuda.")
    if name not in there:
        raise MissingExtra("ONNX Runtime on CUDA", "gpu")
    return name


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
