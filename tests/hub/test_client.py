"""The client without a Hub: offline, and what its messages must not show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from gradmap_hub.errors import HubError, UsageError
from gradmap_hub.hub.client import Hub, RemoteModel
from gradmap_hub.hub.refusals import refusal
from gradmap_hub.hub.retry import Patience

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


def forget_session() -> None:
    """The client's session knows for ever whether it was offline."""
    forget = "reset_sessions" if hasattr(_http, "reset_sessions") else "close_session"  # up to 0.36, and later
    getattr(_http, forget)()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache with a model at one commit, fetched by that, and the client in its offline mode."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--org--name" / "snapshots" / COMMIT
    (snapshot / "onnx").mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "onnx" / "model.onnx").write_bytes(b"1234")
    forget_session()
    yield tmp_path / "models--org--name"
    forget_session()


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


ETAG = "a" * 64
HOSTILE = {
    "ETag": {"ETag": '"../../../../../outside"'},
    "linked ETag": {"X-Linked-Etag": '"/etc/outside"', "ETag": ETAG},
    "commit": {"X-Repo-Commit": "../../../outside"},
    "redirect": {"ETag": '"..\\\\outside"', "Location": "http://127.0.0.1:9/file"},
    "long": {"ETag": "a" * 300},
}
HARMLESS = {
    "quoted": {"ETag": f'"{ETAG}"'},
    "weak": {"ETag": f'W/"{ETAG}-2"'},
}


@contextmanager
def hub_with(headers: dict[str, str]) -> Iterator[str]:
    """A Hub with one file, which answers about it with these headers."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(302 if "Location" in headers else 200)
            for name, value in ({"X-Repo-Commit": COMMIT, "Content-Length": "2"} | headers).items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", [*HOSTILE, *HARMLESS])
def test_a_hub_does_not_write_outside_of_the_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point_client_at: Callable[[str], None]
) -> None:
    cache = tmp_path / "a" / "b" / "cache"
    with hub_with((HOSTILE | HARMLESS)[name]) as url:
        point_client_at(url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        hub = Hub(url, patience=Patience(sleep=lambda _: None))
        if name in HARMLESS:
            assert (hub.fetch("org/name", COMMIT, ["config.json"]) / "config.json").read_text() == "{}"
        else:
            with pytest.raises(HubError, match="which is not a hash"):
                hub.fetch("org/name", COMMIT, ["config.json"])
    written = [path for path in tmp_path.rglob("*") if not path.is_relative_to(cache) and path not in cache.parents]
    assert written == []


def test_no_password_in_the_endpoint() -> None:
    with pytest.raises(UsageError, match="HF_ENDPOINT contains") as caught:
        Hub("https://me:secret@hub.example")
    assert "secret" not in str(caught.value)


def test_signed_addresses_are_not_shown() -> None:
    error = ValueError("Bad request for https://cdn.example/a/b?X-Amz-Signature=secret&X-Amz-Date=1: no")
    shown = refusal("https://hub.example", "upload to", "org/name", "", error)
    assert isinstance(shown, HubError) and "https://cdn.example/a/b" in shown.message
    assert "secret" not in shown.message
