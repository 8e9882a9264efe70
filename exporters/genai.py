"""The float32 graph of ONNX Runtime GenAI's model builder: one GroupQueryAttention node per layer, including rotary
embedding and KV cache. It decodes twice as fast as Optimum's graph and also runs on plain onnxruntime.

The builder is used only for float32. For models with tied embeddings, its int8 and asymmetric int4 graphs are invalid
although it reports success (0.15.2), so `quantized` quantises its float32 graph instead.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradmap_hub.errors import MissingExtra, VerificationError
from gradmap_hub.exporters.processes import WorkerFailed, call
from gradmap_hub.models.architectures import ARCHITECTURES, head_size
from gradmap_hub.models.transformers_compat import has_5

# What the builder writes.
MODEL = "model.onnx"
CONFIG = "genai_config.json"
# A key of the graph's metadata that gradmap_hub.runtime reads.
SHARED_BUFFER = "past_present_share_buffer"
_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")


def require() -> None:
    """Check, before any expensive work, that the builder can run.

    Raises:
        MissingExtra: the extra `onnx` or a runtime is not installed.
    """
    if has_5():
        return  # exports run in a separate environment
    if any(importlib.util.find_spec(module) is None for module in ("onnx", "onnx_ir")):
        raise MissingExtra("The GenAI export", "onnx")
    if any(importlib.util.find_spec(module) is None for module in ("onnxruntime", "onnxruntime_genai")):
        raise MissingExtra("ONNX Runtime GenAI", "cpu")


def unsupported(config: Mapping[str, Any]) -> str | None:
    """The reason why the builder cannot write a correct graph for this config.json, or None.

    Decided without reading weights: errors that show only beyond the length of our checks (windows, long-context
    rotary embeddings) would pass them.
    """
    kind = str(config.get("model_type"))
    row = ARCHITECTURES.get(kind)
    if row is None or not row.genai:
        return f"the builder does not know model type {kind!r}"
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if activation not in _ACTIVATIONS:
        return f"the builder does not know the activation {activation!r}"
    if float(config.get("partial_rotary_factor") or 1.0) != 1.0:
        return "its rotary embedding covers only a part of each head"
    return _window_reason(config) or _rotary_reason(kind, config)


def _window_reason(config: Mapping[str, Any]) -> str | None:
    """The reason if only some layers have a sliding window: the builder gives all layers the same one."""
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return None
    types = set(config.get("layer_types") or ())
    if not types and config.get("model_type") in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        # transformers derives the types: full below max_window_layers, sliding from there on.
        first = int(config.get("max_window_layers", 28))
        types = {"sliding_attention"} if first <= 0 else {"full_attention", "sliding_attention"}
    if "full_attention" in types:
        return "some of its layers have a sliding window and others full attention"
    return None


def _rotary_reason(kind: str, config: Mapping[str, Any]) -> str | None:
    scaling = config.get("rope_scaling") or {}
    name = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "phi3":
        original = config.get("original_max_position_embeddings", 4096)
        if name != "default" or config.get("max_position_embeddings", 4096) != original:
            return "its rotary embedding changes with the length of the text (LongRoPE)"
        return None
    if name == "default" or (name == "llama3" and kind == "llama") or (name == "linear" and kind != "llama"):
        return None
    return f"the builder ignores rotary scaling of type {name!r} for {kind}"


def build(checkpoint: Path, destination: Path) -> Path:
    """Build the float32 graph of the checkpoint folder into `destination` (model.onnx, its data, genai_config.json).
    The destination appears only when it is complete. Returns the path of the graph.

    Raises:
        VerificationError: the builder failed; the message contains its last line of output.
    """
    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        arguments = {"source": str(checkpoint), "destination": str(partial), "head_size": head_size(config)}
        call("genai_worker", arguments)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, WorkerFailed):
            raise VerificationError(
                f"The GenAI export failed: {error}", hint="The pruned checkpoint is complete; leave this format out."
            ) from error
        raise
    shutil.rmtree(destination, ignore_errors=True)
    partial.rename(destination)
    return destination / MODEL


def finish(graph: Path, head_size: int) -> None:
    """Complete what the builder wrote, in place: record that past and present may share one buffer, and write the width
    of keys and values as a number. Derived graphs inherit both.

    The builder leaves that width symbolic, and clients that allocate an empty cache from the declared shape
    (transformers.js, plain onnxruntime) take an unknown symbol for 0.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False)
    properties = {entry.key: entry.value for entry in model.metadata_props} | {SHARED_BUFFER: "true"}
    onnx.helper.set_model_props(model, properties)
    for value in [*model.graph.input, *model.graph.output]:
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = head_size
    graph.write_bytes(model.SerializeToString())
