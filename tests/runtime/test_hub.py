"""A repository's id instead of a folder: only what is run is downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from gradmap_hub import runtime
from gradmap_hub.local_hub import LocalHub


def test_a_repository_answers_as_its_folder_does(published: Path, tmp_path: Path) -> None:
    model = runtime.load(published)
    wanted = "".join(model.start(model.encode("Gravity pulls"), max_tokens=16))
    with LocalHub(tmp_path / "hub") as hub:
        hub.add_user("ada")
        hub.seed("ada/tiny", published)
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
        command = [sys.executable, "-m", "gradmap_hub", "generate"]
        done = subprocess.run(
            [*command, "ada/tiny", "Gravity pulls", "--raw", "-n", "16", "--json"],
            env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["text"] == wanted and answer["model"] == "ada/tiny"
        asked = {request.path for request in hub.requests if "/resolve/" in request.path}
        assert any(path.endswith("onnx/model.onnx") for path in asked)
        assert not any("safetensors" in path for path in asked)
        absent = subprocess.run(
            [*command, "ada/absent", "x"], env=environment, capture_output=True, text=True, timeout=120
        )
        assert absent.returncode == 1 and "ada/absent" in absent.stderr and "Traceback" not in absent.stderr
