"""The libraries of the browser Space: from a registry, checked, and kept. The packages here are made up."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gradmap_hub.errors import BrowserRuntimeMissing
from gradmap_hub.space import vendor

SCRIPT = b"export const one = 1;\n"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a registry with one package, and our pins of it; returns the archive."""
    archive = tmp_path / "registry" / "@acme" / "tool" / "-" / "tool-1.0.0.tgz"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as content:
        entry = tarfile.TarInfo("package/dist/tool.js")
        entry.size = len(SCRIPT)
        content.addfile(entry, io.BytesIO(SCRIPT))
    library = vendor.Library("dist/tool.js", "tool.js", len(SCRIPT), hashlib.sha256(SCRIPT).hexdigest())
    integrity = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    monkeypatch.setattr(vendor, "PACKAGES", (vendor.Package("@acme/tool", "1.0.0", "MIT", integrity, (library,)),))
    monkeypatch.setattr(vendor, "LIBRARIES", {"tool.js": library})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "registry")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    yield archive
    server.shutdown()
    server.server_close()


def test_fetched_once_and_repaired(registry: Path) -> None:
    assert not vendor.fetched()
    folder = vendor.fetch()
    assert (folder / "tool.js").read_bytes() == SCRIPT and vendor.fetched()
    content = registry.read_bytes()
    registry.unlink()
    assert vendor.fetch() == folder  # from the cache
    (folder / "tool.js").write_bytes(b"e" * len(SCRIPT))  # same size, other content
    registry.write_bytes(content)
    assert vendor.is_library(vendor.fetch() / "tool.js")
    assert [path.name for path in folder.iterdir()] == ["tool.js"]


def test_another_package_is_refused(registry: Path) -> None:
    registry.write_bytes(registry.read_bytes() + b"\0")
    with pytest.raises(BrowserRuntimeMissing, match="its sha512 differs") as refused:
        vendor.fetch()
    assert "npm_config_registry" in (refused.value.hint or "") and not vendor.fetched()


@pytest.mark.parametrize("address", ["http://user:secret@127.0.0.1:9", "nowhere"])
def test_a_registry_that_is_not_there(registry: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("npm_config_registry", address)
    with pytest.raises(BrowserRuntimeMissing, match=r"@acme/tool 1\.0\.0: .* cannot be fetched") as refused:
        vendor.fetch()
    assert "secret" not in refused.value.message and "\n" not in refused.value.message


def test_the_pins_are_those_of_the_tests_lock_file() -> None:
    """transformers.js is tested with the same versions of its parts as the page uses."""
    import json

    lock = json.loads((Path(__file__).parents[1] / "js" / "package-lock.json").read_text())["packages"]
    for package in vendor.PACKAGES:
        if package.name.startswith("@huggingface/"):
            entry = lock[f"node_modules/{package.name}"]
            assert (entry["version"], entry["integrity"]) == (package.version, f"sha512-{package.integrity}")
