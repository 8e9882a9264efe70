"""The client without a Hub: offline, and what its messages must not show."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from gradmap_hub.errors import HubError, UsageError
from gradmap_hub.hub.client import Hub, RemoteModel
from gradmap_hub.hub.refusals import refusal

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a model at one commit, fetched by that, and the client in its offline mode."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--org--name" / "snapshots" / COMMIT
    (snapshot / "onnx").mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "onnx" / "model.onnx").write_bytes(b"1234")
    return tmp_path / "models--org--name"


@pytest.mark.parametrize("revision", [None, "main", COMMIT, "refs/pr/1", "v1"])
def test_offline_a_model_is_what_the_cache_has(revision: str | None, cache: Path) -> None:
    for name in ("refs/pr/1", "v1"):
        (cache / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / "refs" / name).write_text(COMMIT)
    found = Hub("http://127.0.0.1:9").model("org/name", revision)
    assert found == RemoteModel("org/name", COMMIT, {"config.json": 2, "onnx/model.onnx": 4}, {}, False, False)


@pytest.mark.parametrize("revision", ["v1", OTHER, "../../..", "main"])
def test_offline_what_the_cache_has_not_is_refused(revision: str, cache: Path) -> None:
    if revision == "main":  # which of them it was is not known
        (cache / "snapshots" / OTHER).mkdir()
    with pytest.raises(HubError, match="did not answer"):
        Hub("http://127.0.0.1:9").model("org/name", revision)


def test_no_password_in_the_endpoint() -> None:
    with pytest.raises(UsageError, match="HF_ENDPOINT contains") as caught:
        Hub("https://me:secret@hub.example")
    assert "secret" not in str(caught.value)


def test_signed_addresses_are_not_shown() -> None:
    error = ValueError("Bad request for https://cdn.example/a/b?X-Amz-Signature=secret&X-Amz-Date=1: no")
    shown = refusal("https://hub.example", "upload to", "org/name", "", error)
    assert isinstance(shown, HubError) and "https://cdn.example/a/b" in shown.message
    assert "secret" not in shown.message
