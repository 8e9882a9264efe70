"""The process that runs ONNX Runtime GenAI's model builder."""

from __future__ import annotations

import shutil
from pathlib import Path

from gradmap_hub.exporters.genai import CONFIG, MODEL, finish

_KEPT = (MODEL, MODEL + ".data", CONFIG)


def main(source: str, destination: str, head_size: int) -> list[str]:
    """Build the float32 graph of `source` for the CPU into `destination`; returns the names of its files. `head_size`:
    width of keys and values."""
    from onnxruntime_genai.models import builder

    cache = str(Path(destination) / "cache")
    # hf_token=false: otherwise the builder reads the user's token, even for a local folder.
    options = builder.parse_extra_options(None, source, destination, "fp32", "cpu", cache, ["hf_token=false"])
    builder.create_model(None, source, destination, "fp32", "cpu", cache, **options)
    for path in Path(destination).iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in _KEPT:
            path.unlink()  # tokenizer files re-saved by the builder; the originals are at the top of the model folder
    finish(Path(destination) / MODEL, head_size)
    return sorted(path.name for path in Path(destination).iterdir())
