"""llama.cpp as a backend of `benchmarks.inference`, through llama-cpp-python if it is installed.

llama.cpp's converter is not an installable package, so this module writes Llama checkpoints as GGUF: header and
tokenizer come from the original's GGUF file, tensors from the checkpoint, with rotary weights in llama.cpp's order.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradmap_hub.runtime.scores import negative_log_likelihoods

# llama.cpp's names. K-quants need widths that are multiples of 256, so they are left out.
TYPES = ("Q8_0", "Q5_1", "Q4_1", "Q4_0")


def available() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def write_gguf(checkpoint: Path, template: Path, destination: Path) -> None:
    """Write `checkpoint` (safetensors, model type llama) as float32 GGUF. `template`: the original's GGUF file.

    Raises:
        SystemExit: the checkpoint is not a Llama.
    """
    import gguf
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    if config.model_type != "llama":
        raise SystemExit(f"Only Llama checkpoints can be written as GGUF, not {config.model_type}.")
    reader = gguf.GGUFReader(template)
    writer = gguf.GGUFWriter(destination, "llama")
    layers = "llama.block_count"
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type", layers):
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_key_value(layers, config.num_hidden_layers, gguf.GGUFValueType.UINT32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # a file of tensors, not a dict
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                values = tensors.get_tensor(name).to(torch.float32).numpy()
                for part, count in heads.items():
                    if name.endswith(f"{part}.weight"):
                        halves = values.reshape(count, 2, len(values) // count // 2, -1)
                        values = halves.swapaxes(1, 2).reshape(values.shape)
                found = names.get_name(name, try_suffixes=(".weight",))
                assert found is not None, name
                writer.add_tensor(found, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, destination: Path, type_name: str, threads: int) -> None:
    """Quantise the GGUF file `source` with llama.cpp's own routine; `type_name`: one of TYPES."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_name}")
    parameters.nthread = threads
    _quiet(llama_cpp)
    if llama_cpp.llama_model_quantize(bytes(source), bytes(destination), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp could not write {destination.name}")


class LlamaCpp:
    """A `gradmap_hub.evaluation.speed.Backend` that runs `batch` equal sequences at a time."""

    def __init__(self, path: Path, threads: int, batch: int = 1, context: int = 512) -> None:
        import llama_cpp

        self._cpp: Any = llama_cpp
        _quiet(llama_cpp)
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(bytes(path), model)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = context * batch, batch
        settings.n_batch = settings.n_ubatch = max(512, 128 * batch)
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._rows = batch
        self._batch = llama_cpp.llama_batch_init(settings.n_batch, 0, batch)

    def _run(self, ids: Sequence[int], rows: int, logits: str) -> np.ndarray:
        """Append the same tokens to each of the first `rows` sequences.

        Returns the first sequence's logits: (1, vocabulary) of the last token, or (tokens, vocabulary) if `logits` is
        "all".
        """
        batch, count = self._batch, 0
        for row in range(rows):
            for place, token in enumerate(ids):
                batch.token[count], batch.pos[count] = token, self._length + place
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, row
                batch.logits[count] = logits == "all" or place == len(ids) - 1
                count += 1
        batch.n_tokens = count
        if self._cpp.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp could not decode")
        self._length += len(ids)
        shape = (len(ids) if logits == "all" else 1, self._vocabulary)
        return np.ctypeslib.as_array(self._cpp.llama_get_logits(self._context), shape=shape)

    def _forget(self) -> None:
        self._cpp.llama_memory_clear(self._cpp.llama_get_memory(self._context), True)
        self._length = 0

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """The logits of each token: (tokens, vocabulary)."""
        self._forget()
        return self._run(ids, 1, "all").copy()

    def read(self, ids: Sequence[int]) -> None:
        self._forget()
        self._next = int(self._run(ids, self._rows, "last")[0].argmax())

    def write(self) -> int:
        token = self._next
        self._next = int(self._run([token], self._rows, "last")[0].argmax())
        return token

    def losses(self, ids: Sequence[int]) -> np.ndarray:
        self._forget()
        return negative_log_likelihoods(self._run(ids, 1, "all")[:-1], ids[1:])


def _quiet(llama_cpp: Any) -> None:
    global _silence
    _silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(_silence, None)


# Keeps the ctypes callback alive as long as the library may call it.
_silence: Any = None
