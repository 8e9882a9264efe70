"""The inputs of all export formats of one checkpoint: float32 graphs, PyTorch reference, Hessians. Each is computed
once and cached in a work folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gradmap_hub.errors import VerificationError
from gradmap_hub.exporters import gate, genai, onnx
from gradmap_hub.exporters.gate import GateResult
from gradmap_hub.exporters.processes import WorkerFailed, call
from gradmap_hub.formats import Format
from gradmap_hub.models.architectures import dimension, head_size

Rows = npt.NDArray[np.int64]


class Inputs:
    """What a writer reads. Every file is created on first use and cached under the checkpoint's fingerprint.

    Attributes:
        checkpoint: Folder of the safetensors checkpoint.
        config: Its config.json.
        layers: Number of decoder layers.
        head_size: Width of one attention head.
        folder: The cache.
    """

    def __init__(self, checkpoint: Path, work: Path, rows: Rows, fit: Rows | None, optimum: Path | None) -> None:
        """`rows`, `fit`, `optimum`: see `gradmap_hub.exporters.export.export`; `work`: the folder of the cache."""
        self.checkpoint = checkpoint
        self.config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        self.layers = dimension(self.config, "num_hidden_layers") or 0
        self.head_size = head_size(self.config)
        self._optimum = optimum
        self._rows, self._fit = rows, fit
        self.folder = work / _fingerprint(checkpoint, rows, fit)
        if not self.folder.is_dir():
            shutil.rmtree(work, ignore_errors=True)  # of another checkpoint
            self.folder.mkdir(parents=True)

    def base_of(self, row: Format) -> str:
        return base_of(row, self.config)

    def float32(self) -> Path:
        """The float32 graph that formats with base "either" are made from."""
        if genai.unsupported(self.config) is not None:
            return self.optimum()
        folder = self.folder / "genai"
        return folder / genai.MODEL if folder.is_dir() else genai.build(self.checkpoint, folder)

    def optimum(self) -> Path:
        """Optimum's float32 graph."""
        if self._optimum is not None:
            return self._optimum
        path = self.folder / "optimum" / onnx.MODEL
        if not path.is_file():
            onnx.export_onnx(self.checkpoint, path.parent)
        return path

    def genai_config(self) -> Path | None:
        """The genai_config.json of GenAI's graph; None if that graph was not built."""
        path = self.folder / "genai" / genai.CONFIG
        return path if path.is_file() else None

    def end_token(self) -> int | None:
        """The id of the tokenizer's token that ends a text; None if it has none."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            self.checkpoint, local_files_only=True, trust_remote_code=False
        ).eos_token_id

    def rows(self) -> Path:
        """The held-out tokens as an .npy file, (sequences, tokens) int64."""
        return self._saved("rows.npy", self._rows)

    def hessians(self) -> Path | None:
        """The folder that `calibrate` writes; None without sequences to fit on, or if it would exceed DISK_LIMIT."""
        folder = self.folder / "hessians"
        if self._fit is None or folder.is_dir():
            return folder if folder.is_dir() else None
        partial = self.folder / "hessians.partial"
        shutil.rmtree(partial, ignore_errors=True)
        fit = self._saved("fit.npy", self._fit)
        arguments = {"base": str(self.float32()), "rows": str(fit), "destination": str(partial)}
        if not run_worker("calibrate", {**arguments, "head_size": self.head_size}):
            return None
        partial.rename(folder)
        return folder

    def check(self, graph: Path, row: Format) -> GateResult:
        """Check a graph within the limits of its format; a format without limits passes unchecked."""
        if row.limits is None:
            return GateResult(True, "")
        return gate.check(graph, self.reference(), self.rows(), self.layers, self.head_size, row.limits)

    def reference(self) -> Path:
        """PyTorch's results for the check, in float32; see reference.py."""
        path = self.folder / "reference.npz"
        if not path.is_file():
            partial = self.folder / "partial.npz"
            arguments = {"checkpoint": str(self.checkpoint), "rows": str(self.rows()), "destination": str(partial)}
            run_worker("reference", arguments)
            os.replace(partial, path)
        return path

    def _saved(self, name: str, rows: Rows) -> Path:
        path = self.folder / name
        if not path.is_file():
            np.save(path, np.ascontiguousarray(rows, np.int64))
        return path


def base_of(row: Format, config: Mapping[str, Any]) -> str:
    """The source of a format for a model with this config.json: "optimum", "genai" or "checkpoint"."""
    if row.base != "either":
        return row.base
    return "genai" if genai.unsupported(config) is None else "optimum"


def run_worker(module: str, arguments: Mapping[str, Any]) -> Any:
    """Run a worker of the export of a checkpoint; see `processes.call`.

    Raises:
        VerificationError: the worker failed.
    """
    try:
        return call(module, arguments)
    except WorkerFailed as error:
        raise VerificationError(
            f"The export failed ({module}): {error}", hint="The pruned checkpoint is complete; leave this format out."
        ) from error


def _fingerprint(checkpoint: Path, rows: Rows, fit: Rows | None) -> str:
    digest = hashlib.sha256()
    for path in [checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))]:
        state = path.stat()
        digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns} ".encode())
    for ids in (rows, fit):
        digest.update(b"none" if ids is None else np.ascontiguousarray(ids, np.int64).tobytes())
    return digest.hexdigest()[:16]
