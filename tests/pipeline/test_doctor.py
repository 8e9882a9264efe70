"""`doctor`: what it finds is what is there, and what is wrong is named with the line that mends it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gradmap_hub.cli.app import app
from gradmap_hub.hub.client import Hub
from gradmap_hub.hub.retry import Patience
from gradmap_hub.local_hub import LocalHub
from gradmap_hub.pipeline import doctor as module
from gradmap_hub.pipeline.doctor import Diagnosis, doctor
from gradmap_hub.progress import SilentReporter

AT_ONCE = Patience(tries=1)


def diagnosed(hub: Hub | None = None) -> Diagnosis:
    return doctor(SilentReporter(), hub, offline=hub is None)


def test_what_is_installed_is_found() -> None:
    found = diagnosed()
    assert found.gradmap_hub == importlib.metadata.version("gradmap-hub")
    assert found.packages["torch"] == importlib.metadata.version("torch")
    assert found.devices[0].kind == "cpu" and found.cpus > 0 and found.memory > 1e9
    extras = {extra.name: extra for extra in found.extras}
    assert not extras["cpu"].missing and extras["gpu"].missing
    assert extras["gpu"].install == "pip install 'gradmap-hub[gpu]'"
    assert "CPUExecutionProvider" in found.providers
    assert found.lane == importlib.metadata.version("transformers")[0]
    assert not found.hub.reachable and found.hub.problem == "not asked: offline"


def test_every_extra_is_looked_at() -> None:
    named = importlib.metadata.metadata("gradmap-hub").get_all("Provides-Extra") or []
    assert set(module.EXTRAS) == set(named) - {"all", "dev"}


def test_the_hub_answers_and_knows_the_account(tmp_path: Path) -> None:
    with LocalHub(tmp_path / "hub") as hub:
        token = hub.add_user("ada")
        known = diagnosed(Hub(hub.url, token, patience=AT_ONCE)).hub
        assert known.reachable and known.account == "ada" and known.role == "write"
        refused = diagnosed(Hub(hub.url, "hf_wrong", patience=AT_ONCE))
        assert refused.hub.reachable and refused.hub.account is None
        assert any("token" in problem.what for problem in refused.problems)
        assert "hf_wrong" not in str(refused) and token not in str(known)


def test_a_hub_that_is_not_there() -> None:
    found = diagnosed(Hub("http://127.0.0.1:9", "hf_x", patience=AT_ONCE))
    assert not found.hub.reachable and any("127.0.0.1:9" in problem.what for problem in found.problems)


def test_what_is_missing_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "gradio":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "safetensors" else real(name)

    monkeypatch.setattr(module, "version", version)
    found = diagnosed()
    assert next(extra for extra in found.extras if extra.name == "space").missing == ["gradio<7,>=6.17"]
    [problem] = [problem for problem in found.problems if "safetensors" in problem.what]
    assert "0.1 is installed" in problem.what and problem.mend.startswith("pip install 'safetensors")


def test_a_folder_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda _path: 1_000_000)
    assert any("0.0 GB free" in problem.what for problem in diagnosed().problems)


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda _path: 10**12)
    done = CliRunner().invoke(app, ["doctor", "--offline", "--json", "--quiet"])
    answer: dict[str, Any] = json.loads(done.stdout)
    assert done.exit_code == (1 if answer["problems"] else 0)
    assert answer["extras"][0]["install"] == "pip install 'gradmap-hub[cpu]'"
    shown = CliRunner().invoke(app, ["doctor", "--offline", "--quiet"])
    assert "CPUExecutionProvider" in shown.stdout and "Nothing is wrong." in shown.stdout
