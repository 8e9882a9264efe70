"""A Space as Hugging Face builds it: a fresh environment, first requirements.txt, then gradio at the card's version."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from gradmap_hub.space.app import write_space

from .conftest import plan_for, record_for

pytestmark = pytest.mark.slow

INSTALLED_BYTES = 600_000_000
FIRST_ANSWER, MODELS_READY = 15, 20
# Speaks MCP as any client would; runs in the Space's environment, which is the one that has the package.
ASK_MCP = """
import asyncio, json, sys
from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client

async def main(url):
    async with streamablehttp_client(url) as (read, write, _), ClientSession(read, write) as session:
        await session.initialize()
        tools = {tool.name: tool for tool in (await session.list_tools()).tools}
        schema = tools["compare"].inputSchema["properties"]
        answer = await session.call_tool("compare", {"prompt": "What is the capital of France?", "max_new_tokens": 6})
        print(json.dumps({"tools": sorted(tools), "described": tools["compare"].description,
                          "parameters": {name: entry.get("description", "") for name, entry in schema.items()},
                          "error": answer.isError, "text": [part.text for part in answer.content]}))

asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def space(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as the push writes it, with the tiny original."""
    import shutil

    folder = tmp_path_factory.mktemp("built") / "space"
    shutil.copytree(pair.original_onnx, folder / "original")
    companions = {path.name: path for path in pair.original_onnx.glob("*.json")}
    write_space(record_for(pair.pruned_onnx), plan_for("int8", "float32"), folder, pruned_repo="a/b",
                companions=companions)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def python(space: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the environment that requirements.txt and the card ask for."""
    root = tmp_path_factory.mktemp("venv") / "venv"
    subprocess.run([sys.executable, "-m", "venv", root], check=True)
    card = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---")[1])
    pip = [root / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "-r", space / "requirements.txt"], check=True)
    subprocess.run([*pip, "install", f"gradio[oauth,mcp]=={card['sdk_version']}", "spaces"], check=True)
    subprocess.run([*pip, "check"], check=True)
    return root / "bin" / "python"


def test_it_is_small_and_has_no_torch(python: Path) -> None:
    packages = next((python.parents[1] / "lib").glob("python*/site-packages"))
    size = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"{size:,} bytes installed")
    assert size < INSTALLED_BYTES
    assert not (packages / "torch").exists()


@pytest.fixture(scope="module")
def started(python: Path, space: Path, pair: Any, kit: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """The app in that environment, with the seconds until it answered and until its models were there."""
    began = time.monotonic()
    app = kit.start_app(space, python=str(python), PRUNED_MODEL=str(pair.pruned_onnx))
    try:
        app.wait_until(lambda health: True)
        answered = time.monotonic()
        health = app.wait_until(lambda health: health["state"] != "loading")
        assert health["state"] == "ready", health
        yield SimpleNamespace(app=app, first=answered - began, models=time.monotonic() - answered)
    finally:
        assert kit.stop_app(app) == 0


def test_it_is_there_soon(started: SimpleNamespace) -> None:
    print(f"first answer after {started.first:.1f} s, models after {started.models:.1f} s more")
    assert started.first < FIRST_ANSWER
    assert started.models < MODELS_READY


def test_its_api_is_a_tool_for_mcp_clients(started: SimpleNamespace, python: Path) -> None:
    url = f"{started.app.url}/gradio_api/mcp/"
    done = subprocess.run([python, "-c", ASK_MCP, url], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tools"] == ["compare", "status"]
    assert "original" in found["described"] and "pruned" in found["described"]
    assert set(found["parameters"]) == {"prompt", "max_new_tokens", "temperature", "seed", "precision"}
    assert all(found["parameters"].values()), found["parameters"]
    # Gradio hands a dictionary on in Python's words.
    answer = ast.literal_eval("".join(found["text"]))
    assert not found["error"] and answer["speed_ratio"] > 0 and answer["pruned"]["tokens"] == 6
