"""Folders as they are published: tokenizer at the top, graphs in onnx/."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def published(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny original with its ONNX export."""
    folder = tmp_path_factory.mktemp("runtime") / "tiny-gradmap"
    shutil.copytree(tiny.original, folder)
    (folder / "onnx").mkdir()
    shutil.copy(tiny.original_onnx / "model.onnx", folder / "onnx")
    return folder
