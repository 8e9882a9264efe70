"""The documentation site: every link of its pages leads somewhere; built, it asks no other host and axe finds nothing
serious."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import shutil
import subprocess
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def make_site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs" / "make_site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_link_leads_somewhere(make_site: Any, tmp_path: Path) -> None:
    make_site.main(tmp_path)
    pages = {path.name for path in (tmp_path / "pages").glob("*.md")}
    named = (tmp_path / "zensical.toml").read_text(encoding="utf-8")
    assert pages == {name for name in pages if f'"{name}"' in named}
    assert "](guide.md#heal)" in (tmp_path / "pages" / "index.md").read_text(encoding="utf-8")
    commands = (tmp_path / "pages" / "cli.md").read_text(encoding="utf-8")
    assert "## `gradmap-hub push`" in commands and "--ratio" in commands


def test_a_link_to_nothing_is_found(make_site: Any, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "# One thing\n[x](b.md#two) [y](c.md) [z](#one-thing)\n```\n[not](d.md)\n```\n", encoding="utf-8"
    )
    (tmp_path / "b.md").write_text("# Three\n", encoding="utf-8")
    assert list(make_site.broken_links(tmp_path)) == ["a.md: b.md#two has no such heading", "a.md: c.md does not exist"]


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_built_site(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    subprocess.run(["make", "docs"], cwd=ROOT, check=True, capture_output=True)
    handler = functools.partial(Quiet, directory=str(ROOT / "build" / "site" / "html"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    try:
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            for width, scheme in ((1280, "light"), (390, "dark")):
                page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                asked: list[str] = []
                problems: list[str] = []
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.on("console", lambda said, problems=problems: problems.append(said.text))
                for name in ("index", "guide", "cli", "api", "benchmarks"):
                    page.goto(f"{home}{name}.html", wait_until="networkidle")
                    assert page.evaluate("document.documentElement.scrollWidth") <= width
                    found = axe.run(page).response["violations"]
                    assert [entry["id"] for entry in found if entry["impact"] in ("serious", "critical")] == []
                assert all(url.startswith((home, "data:")) for url in asked) and problems == []
            browser.close()
    finally:
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        del format, args
