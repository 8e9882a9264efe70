"""One text generation graph in ONNX Runtime, and the decode loop on it with a KV cache.

Two kinds of graph are known. Optimum's "text-generation-with-past" returns keys and values of all tokens anew with
every step; they stay in ONNX Runtime's memory and are handed back as they came. Graphs with GroupQueryAttention (made
by ONNX Runtime GenAI's model builder) write into the buffers they read: allocated once, for as many tokens as may come.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort

from gradmap_hub.errors import GradmapError, MissingExtra, SourceError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_PAST, _PRESENT = "past_key_values.", "present."
_PLAIN = frozenset({"input_ids", "attention_mask", "position_ids"})
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Steps(Protocol):
    """The model with the cache of one text."""

    def run(self, token_ids: Sequence[int]) -> np.ndarray:
        """Append the tokens; the logits behind each of them, (tokens, vocabulary) in the graph's own type."""
        ...

    def close(self) -> None:
        """Give the cache back. Called once."""
        ...


class Session:
    """A graph, loaded. `provider`: the execution provider that it really runs on. `head_size`: of keys and values, for
    graphs that leave it open."""

    def __init__(self, graph: Path, provider: str, threads: int, head_size: int) -> None:
        self._head_size = head_size
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Within a step threads wait for each other in a loop, which is faster than being woken; when it ends they
        # sleep, so that an idle server does not keep the processors busy.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(graph), sess_options=options, providers=_providers(provider))
        except Exception as error:  # onnxruntime's own exceptions have no common base class
            raise SourceError(f"{graph.name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
        self.provider: str = self._session.get_providers()[0]
        if self.provider != provider:
            # Without a working CUDA, onnxruntime-gpu falls back in silence.
            raise GradmapError(
                f"{provider} is not usable here: ONNX Runtime fell back to {self.provider}.",
                hint="Check the driver and CUDA libraries, or take --provider cpu.",
            )
        self.device = "cuda" if provider == CUDA else "cpu"
        self.past: dict[str, tuple[list[int | str], type]] = {}
        plain = set()
        for value in self._session.get_inputs():
            if value.name.startswith(_PAST):
                if value.type not in _NUMPY_TYPES:
                    raise SourceError(f"{graph.name} keeps its cache as {value.type}, which is not supported.")
                self.past[value.name] = (list(value.shape), _NUMPY_TYPES[value.type])
            else:
                plain.add(value.name)
        if "input_ids" not in plain or plain - _PLAIN or not self.past:
            found = ", ".join(sorted(plain)) or "none"
            raise SourceError(f"{graph.name} is not a text generation graph with a KV cache (inputs: {found}).")
        self.plain = frozenset(plain)
        self.presents = [value.name for value in self._session.get_outputs() if value.name.startswith(_PRESENT)]
        if len(self.presents) != len(self.past):
            raise SourceError(f"{graph.name} reads {len(self.past)} cache tensors and returns {len(self.presents)}.")
        self.shares_buffer = _shares_buffer(self._session)

    def start(self, capacity: int) -> Steps:
        """An empty cache. `capacity`: the most tokens that it must hold."""
        return _SharedBuffer(self, capacity) if self.shares_buffer else _Growing(self)

    @property
    def batches(self) -> bool:
        """Whether texts of different length can take a step together (see pool.py)."""
        open_ended = all(not isinstance(shape[0], int) for shape, _ in self.past.values())
        return self.shares_buffer and self.device == "cpu" and "position_ids" not in self.plain and open_ended

    def binding(self) -> ort.IOBinding:
        return self._session.io_binding()

    def run(self, binding: ort.IOBinding) -> None:
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's own exceptions have no common base class
            raise GradmapError(f"ONNX Runtime failed: {' '.join(str(error).split())[:300]}") from error

    def feeds(self, token_ids: Sequence[int], length: int) -> dict[str, np.ndarray]:
        """The plain inputs of a step behind `length` tokens; batch 1."""
        end = length + len(token_ids)
        every = {
            "input_ids": np.array([token_ids], dtype=np.int64),
            "attention_mask": np.ones((1, end), dtype=np.int64),
            "position_ids": np.arange(length, end, dtype=np.int64)[None, :],
        }
        return {name: every[name] for name in self.plain}

    def cache_shape(self, name: str, rows: int, tokens: int) -> list[int]:
        """Of a cache tensor: (rows, heads, tokens, head size)."""
        shape, _ = self.past[name]
        # A graph may fix any but the tokens.
        if len(shape) != 4 or not isinstance(shape[1], int):
            raise SourceError(f"The cache input {name} has an unknown shape: {shape}.")
        own = (rows, shape[1], tokens, self._head_size)
        return [given if isinstance(given, int) else size for given, size in zip(shape, own, strict=True)]

    def empty(self, name: str, tokens: int) -> ort.OrtValue:
        """A cache tensor of a batch of one and so many tokens, zeros."""
        zeros = np.zeros(self.cache_shape(name, 1, tokens), dtype=self.past[name][1])
        return ort.OrtValue.ortvalue_from_numpy(zeros, self.device, 0)

    @staticmethod
    def present_of(past: str) -> str:
        """The output that belongs to a cache input."""
        return _PRESENT + past.removeprefix(_PAST)


class _Growing:
    """Past in, present out: what a step returns is what the next one gets."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._length = 0
        self._cache = {name: session.empty(name, 0) for name in session.past}

    def run(self, token_ids: Sequence[int]) -> np.ndarray:
        session = self._session
        binding = session.binding()
        for name, value in session.feeds(token_ids, self._length).items():
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
        self._length += len(token_ids)
        return logits.numpy()[0]

    def close(self) -> None:
        self._cache = {}


class _SharedBuffer:
    """Past and present are one buffer, bound once."""

    def __init__(self, session: Session, capacity: int) -> None:
        self._session = session
        self._length = 0
        self._binding = session.binding()
        # Outputs come back in the order they are bound.
        self._binding.bind_output("logits", "cpu")
        self._buffers = {name: session.empty(name, capacity) for name in session.past}
        for name, buffer in self._buffers.items():
            self._binding.bind_ortvalue_input(name, buffer)
            self._binding.bind_ortvalue_output(session.present_of(name), buffer)

    def run(self, token_ids: Sequence[int]) -> np.ndarray:
        binding = self._binding
        for name, value in self._session.feeds(token_ids, self._length).items():
            binding.bind_cpu_input(name, value)
        # Anew for every step: a bound output keeps the shape it had.
        binding.bind_output("logits", "cpu")
        self._session.run(binding)
        self._length += len(token_ids)
        logits = binding.get_outputs()[0]
        return logits.numpy()[0]

    def close(self) -> None:
        self._buffers = {}


def _shares_buffer(session: ort.InferenceSession) -> bool:
    """Whether past and present may be one buffer; our exports say so in the graph's metadata."""
    return session.get_modelmeta().custom_metadata_map.get("past_present_share_buffer") == "true"


def _providers(provider: str) -> list[str]:
    return [provider] if provider == CPU else [provider, CPU]


def provider_named(wanted: str) -> str:
    """The execution provider for `auto`, `cpu`, `cuda` or its full name.

    Raises:
        MissingExtra: CUDA was asked for, and this build of ONNX Runtime has no part in it.
        GradmapError: a provider that nobody here knows how to drive.
    """
    there = ort.get_available_providers()
    if wanted == "auto":
        # A build for GPUs lists CUDA on machines without one.
        return CUDA if CUDA in there and _has_gpu() else CPU
    name = {"cpu": CPU, "cuda": CUDA}.get(wanted.lower(), wanted)
    if name not in (CPU, CUDA):
        raise GradmapError(f"The execution provider {wanted!r} is not supported; take cpu or cuda.")
    if name not in there:
        raise MissingExtra("ONNX Runtime on CUDA", "gpu")
    return name


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
