"""What a folder of somebody else may not do to the process that loads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.errors import SourceError
from gradmap_hub.runtime import load


def test_a_tokenizer_is_tried_before_it_is_loaded(tiny: Any, tmp_path: Path) -> None:
    """It loads, and would take gigabytes for the first long prompt."""
    folder = Path(shutil.copytree(tiny.pruned_onnx, tmp_path / "small"))
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 1000}
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SourceError, match="its normalizer makes a text more than 16 times longer"):
        load(folder)
