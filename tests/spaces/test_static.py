"""The browser Space as a visitor meets it: headless Chromium on the site that the embedded Hub serves after a publish,
and on `gradmap-hub compare --in browser`; with the tiny pair, and with the real one (slow)."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradmap_hub import load
from gradmap_hub.card.card import card_text
from gradmap_hub.config import PublishConfig
from gradmap_hub.errors import BrowserRuntimeMissing
from gradmap_hub.files import write_text
from gradmap_hub.formats import of_precision
from gradmap_hub.hub.client import Hub
from gradmap_hub.layout import artifact, space_folder_of, weight_artifacts
from gradmap_hub.local_hub import LocalHub
from gradmap_hub.pipeline.publish import publish_folder
from gradmap_hub.record import Base
from gradmap_hub.space.app import ModelFiles, write_space
from gradmap_hub.space.vendor import fetch

from .conftest import plan_for, record_for
from .test_browser import ARGUMENTS, CHROMIUM, FINISHED, keep

pytestmark = pytest.mark.browser

PROMPT = "What is the capital of France?"
SWIFTSHADER = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]
# A probe for WebGPU; Chromium writes it where there is no GPU.
HARMLESS = "No available adapters."


@pytest.fixture(scope="module")
def libraries() -> Path:
    try:
        return fetch()
    except BrowserRuntimeMissing as error:
        pytest.skip(error.message)


@contextlib.contextmanager
def chromium(*arguments: str) -> Iterator[Any]:
    playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS, *arguments])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


class Visit:
    """One page, with everything that went wrong in its console and every request to another host than `hosts`."""

    def __init__(self, browser: Any, url: str, width: int = 1280, scheme: str = "light", *hosts: str) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.context.on("request", lambda request: self._request(request.url, (url, *hosts, "data:", "blob:")))
        self.page.goto(url)
        self.page.wait_for_selector("#load, #notice .error, #start h2")

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning") and message.text != HARMLESS:
            self.problems.append(message.text)

    def _request(self, address: str, allowed: tuple[str, ...]) -> None:
        self.requests.append(address)
        if not address.startswith(allowed):
            self.problems.append(f"asked another host: {address}")

    def load(self, seconds: int = 60) -> None:
        self.page.click("#load")
        self.page.wait_for_selector("#go:not([disabled]), #notice .error", timeout=1000 * seconds)
        assert self.page.inner_text("#notice") == ""

    def set(self, name: str, value: float) -> None:
        self.page.evaluate(
            "([name, value]) => { const field = document.getElementById(name); field.value = value;"
            " field.dispatchEvent(new Event('input')); }",
            [name, value],
        )

    def choose(self, value: str) -> None:
        """A radio button of the settings."""
        self.page.evaluate("document.getElementById('settings').open = true")
        self.page.check(f"input[value={value}]")

    def compare(self, prompt: str) -> None:
        self.page.fill("#text", prompt)
        self.page.click("#go")

    def wait_until_finished(self, seconds: int = 60) -> list[str]:
        for side in ("left", "right"):
            ended = ", ".join(f":text-is('{words}')" for words in FINISHED)
            self.page.wait_for_selector(f"#{side} .state:is({ended})", timeout=1000 * seconds)
        self.page.wait_for_selector("#go", state="visible")
        return [self.page.inner_text(f"#{side} .state") for side in ("left", "right")]

    def answers(self) -> list[str]:
        return [self.page.inner_text(f"#{side} .answer") for side in ("left", "right")]

    def close(self) -> None:
        self.context.close()
        assert self.problems == []


def model_folder(pair: Any, folder: Path, precisions: tuple[str, ...]) -> Path:
    """A finished tiny model: its checkpoint, ONNX files, record and card, and its Space folder beside it."""
    shutil.copytree(pair.pruned, folder)
    (folder / "onnx").mkdir()
    files = {name: of_precision(name).file for name in precisions}
    for file in files.values():
        shutil.copyfile(pair.pruned_onnx / file, folder / "onnx" / file)
    record = record_for(folder / "onnx")
    graphs = [
        dataclasses.replace(artifact(folder / entry.path, folder, entry.format), quality=entry.quality)
        for entry in record.artifacts
    ]
    record = dataclasses.replace(
        record,
        base=Base("acme/tiny", "acme/tiny", "main", "c" * 40, "apache-2.0", dtype="float32"),
        artifacts=[*weight_artifacts(folder), *graphs],
        target="ada/small",
        space="ada/small-compare",
    )
    record.write(folder)
    write_text(folder / "README.md", card_text(record))
    space = space_folder_of(folder)
    (space / "original").mkdir(parents=True)
    for path in pair.original_onnx.iterdir():
        if path.suffix != ".onnx" or path.name in files.values():
            shutil.copyfile(path, space / "original" / path.name)
    originals = {name: ModelFiles((space / "original" / file).stat().st_size) for name, file in files.items()}
    companions = {path.name: path for path in pair.original_onnx.glob("*.json")}
    write_space(
        record, plan_for(*precisions), space, pruned_repo="ada/small", companions=companions, originals=originals
    )
    return folder


@contextlib.contextmanager
def published_by(account: str, pair: Any, root: Path, *precisions: str) -> Iterator[SimpleNamespace]:
    """The tiny pair, published: `url` of the site, address of the Hub and of its downloads, and the model folder."""
    folder = model_folder(pair, root / "small", precisions)
    with LocalHub(root / "hub", plans={"ada": account}) as server:
        hub = Hub(server.url, server.add_user("ada"))
        result = publish_folder(folder, PublishConfig(to="ada/small", public=True), hub=hub)
        assert result.space is not None and result.space_state is not None, result.space_reason
        assert result.space_state.stage == "RUNNING"
        url = server.static_url("ada/small-compare")
        yield SimpleNamespace(url=url, hosts=(server.url, server.cdn_url), folder=folder)


@pytest.fixture(scope="module")
def published(tiny: Any, libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Published by a free account, in float32: in int8, the runtimes round the activations differently."""
    with published_by("free", tiny, tmp_path_factory.mktemp("static"), "float32") as found:
        yield found


def expected(folder: Path, prompt: str, tokens: int) -> str:
    """What `gradmap-hub generate` answers with the same file."""
    model = load(folder, artifact="fp32")
    return "".join(model.start(model.encode_chat([{"role": "user", "content": prompt}]), max_tokens=tokens)).strip()


def original_folder(published: SimpleNamespace, root: Path) -> Path:
    """The original of the Space as a folder that `load` reads."""
    space = space_folder_of(published.folder)
    shutil.copytree(space / "original", root / "original" / "onnx")
    for path in [*(space / "original").glob("*.json"), *(space / "original").glob("*.jinja")]:
        shutil.copyfile(path, root / "original" / path.name)
    return root / "original"


def test_a_visit(browser: Any, published: SimpleNamespace, tmp_path: Path) -> None:
    """Download, compare, blind vote, stop, errors; nothing is fetched before the click, and nothing from elsewhere."""
    visit = Visit(browser, published.url, 1280, "light", *published.hosts)
    page = visit.page
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert paint < 1000, paint
    assert page.evaluate("crossOriginIsolated") and "Download" in page.inner_text("#load")
    assert page.is_disabled("#go")
    assert not [address for address in visit.requests if address.endswith((".onnx", ".wasm", "tokenizer.json"))]
    visit.load()
    assert "float32, CPU" in page.inner_text("#banner")
    assert any(
        address.startswith(published.hosts) for address in visit.requests
    )  # the pruned model, from its repository

    visit.set("length", 12)
    visit.compare(PROMPT)
    assert all(state in FINISHED for state in visit.wait_until_finished())
    original = original_folder(published, tmp_path)
    assert visit.answers() == [expected(folder, PROMPT, 12) for folder in (original, published.folder)]
    assert "This run, float32, CPU" in page.inner_text("#verdict")
    assert page.evaluate("document.documentElement.scrollWidth === window.innerWidth")
    keep(page, "static-visit")

    page.evaluate("document.getElementById('settings').open = true")
    page.check("#blind")
    visit.compare(PROMPT)
    page.wait_for_selector("#votes", state="visible")
    assert [page.inner_text(f"#{side} h2") for side in ("left", "right")] == ["Model A", "Model B"]
    assert "tok/s" not in page.inner_text("#left")
    page.get_by_role("button", name="A is better").click()
    chosen = page.inner_text("#left .tag").lower()
    assert f"You preferred the {chosen}" in page.inner_text("#verdict")

    visit.compare("   ")
    assert "Type a prompt first." in page.inner_text("#notice")
    visit.compare("x" * 4001)
    assert "4,001" in page.inner_text("#notice")
    page.uncheck("#blind")
    visit.set("length", 256)
    visit.compare("Write a long story.")
    page.click("#stop")
    page.wait_for_selector("#go", state="visible")
    assert page.inner_text("#left .state") in ("Stopped", *FINISHED)
    visit.close()
