"""Gives an exported graph a second name without a second copy of its weights: clients look for the same file under
different names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from gradmap_hub.exporters.graph import files_of


def main(graph: str, name: str) -> list[str]:
    """Make the graph at the path `graph` available as `name` in the same folder; returns the names of the new files. A
    graph in one file is hard-linked; one with external data is written again, because it contains the name of its data
    file, and the data file is linked."""
    path = Path(graph)
    target, data = path.with_name(name), files_of(path)[1:]
    if not data:
        return [link(path, target).name]
    import onnx

    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name + entry.value.removeprefix(path.name)
    target.write_bytes(model.SerializeToString())
    target.chmod(path.stat().st_mode)
    return [
        target.name,
        *(link(file, target.with_name(name + file.name.removeprefix(path.name))).name for file in data),
    ]


def link(source: Path, target: Path) -> Path:
    """Hard-link a file, or copy it if the file system has no links; returns `target`."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
