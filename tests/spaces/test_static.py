"""The browser Space as a visitor meets it: headless Chromium on the site that the embedded Hub serves after a publish,
and on `gradmap-hub compare --in browser`; with the tiny pair, and with the real one (slow)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from gradmap_hub import load
from gradmap_hub.card.card import card_text
from gradmap_hub.comparison import raw_comparison
from gradmap_hub.config import PublishConfig
from gradmap_hub.errors import BrowserRuntimeMissing
from gradmap_hub.files import write_text
from gradmap_hub.formats import of_precision
from gradmap_hub.hub.client import Hub
from gradmap_hub.layout import artifact, space_folder_of, weight_artifacts
from gradmap_hub.local_hub import LocalHub
from gradmap_hub.pipeline.publish import publish_folder
from gradmap_hub.pipeline.space import local_page
from gradmap_hub.record import Base
from gradmap_hub.space import static_server
from gradmap_hub.space.app import ModelFiles, write_space
from gradmap_hub.space.vendor import fetch

from .conftest import plan_for, record_for
from .test_browser import ARGUMENTS, CHROMIUM, FINISHED, _serious, keep

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


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """`chromium(arguments)`: a browser."""
    playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    with playwright_api.sync_playwright() as playwright:
        opened: list[Any] = []

        def launch(*arguments: str) -> Any:
            opened.append(playwright.chromium.launch(executable_path=CHROMIUM, args=list(arguments)))
            return opened[-1]

        yield launch
        for browser in opened:
            browser.close()


@pytest.fixture(scope="module")
def browser(chromium: Any) -> Any:
    return chromium(*ARGUMENTS)


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
    assert paint < 2500, paint  # below 1000 on an idle machine
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


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_layout_and_axe(browser: Any, published: SimpleNamespace, width: int, scheme: str) -> None:
    """Before the download, and with two answers and everything open."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    visit = Visit(browser, published.url, width, scheme, *published.hosts)
    page = visit.page
    assert _serious(axe, page) == []
    keep(page, f"static-{width}-{scheme}-start")
    visit.load()
    visit.set("length", 24)
    page.get_by_role("button", name="What is the capital").click()
    page.press("#text", "Shift+Enter")
    visit.wait_until_finished()
    for details in page.locator("summary").all():
        details.click()
    assert _serious(axe, page) == []
    assert page.evaluate("document.documentElement.scrollWidth === window.innerWidth")
    left, right = (page.locator(f"#{side} .card").bounding_box() for side in ("left", "right"))
    if width == 390:
        assert right["y"] >= left["y"] + left["height"]
    else:
        assert (left["y"], left["height"]) == (right["y"], right["height"]) and right["x"] >= left["x"] + left["width"]
    for region in ("banner", "spoken"):
        assert page.get_attribute(f"#{region}", "aria-live") == "polite"
    assert (
        page.get_attribute("#notice", "role") == "alert" and page.inner_text("#spoken") == "Both answers are finished."
    )
    keep(page, f"static-{width}-{scheme}")
    visit.close()


@pytest.mark.slow
def test_webgpu(chromium: Any, published: SimpleNamespace) -> None:
    """On SwiftShader: the same tokens as on the CPU. It is slower than the CPU, so the page does not begin with it."""
    arguments = [argument for argument in ARGUMENTS if argument != "--disable-gpu"]
    visit = Visit(chromium(*arguments, *SWIFTSHADER), published.url, 1280, "light", *published.hosts)
    if "webgpu" not in visit.page.inner_html("#backends"):
        pytest.skip("no WebGPU in this Chromium")
    assert "float32, CPU" in visit.page.inner_text("#start .facts")
    found = {}
    for backend, name in (("wasm", "CPU"), ("webgpu", "WebGPU")):
        if backend == "webgpu":
            visit.choose(backend)
        visit.load(240)
        assert f"float32, {name}" in visit.page.inner_text("#banner")
        visit.set("length", 12)
        visit.compare(PROMPT)
        visit.wait_until_finished(240)
        found[backend] = visit.answers()
    assert found["webgpu"] == found["wasm"]
    visit.close()


@pytest.fixture
def site(published: SimpleNamespace, libraries: Path) -> Iterator[Callable[..., Any]]:
    """`site(headers)`: the files that `compare --in browser` serves, with other headers."""

    servers = []

    def start(headers: dict[str, str]) -> str:
        page = local_page(published.folder, "https://huggingface.co")
        files, facts = static_server.local_files(space_folder_of(published.folder), page, libraries)
        app = static_server.build_app(files, facts, "127.0.0.1", headers)
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join()


@pytest.mark.slow
def test_without_the_headers_one_thread_computes(browser: Any, site: Callable[..., str]) -> None:
    visit = Visit(browser, site({}))
    assert not visit.page.evaluate("crossOriginIsolated")
    visit.load()
    assert "CPU with 1 thread," in visit.page.inner_text("#banner")
    visit.set("length", 4)
    visit.compare(PROMPT)
    visit.wait_until_finished()
    visit.page.reload()
    assert visit.page.inner_text("#load") == "Load both models"  # from the browser's own store
    before = len(visit.requests)
    visit.load()
    assert not [address for address in visit.requests[before:] if address.endswith((".onnx", ".wasm"))]
    visit.close()


@pytest.mark.slow
def test_what_does_not_fit_is_said(browser: Any, published: SimpleNamespace, request: pytest.FixtureRequest) -> None:
    """A device with room for one model, then for none; then files that are not there."""
    facts = raw_comparison(space_folder_of(published.folder))
    pair = [facts["precisions"][0][side]["bytes"] for side in ("original", "pruned")]
    visit = Visit(browser, published.url, 390, "light", *published.hosts)
    page = visit.page

    def with_facts(**changes: Any) -> None:
        page.unroute_all()
        page.route("**/compare.json", lambda route: route.fulfill(json=facts | changes))
        page.reload()
        page.wait_for_selector("#load, #start h2, #notice .error")

    section = facts["browser"]
    with_facts(browser=section | {"most_bytes": sum(pair) - 1})
    assert "only the pruned one is offered" in page.inner_text("#start")
    visit.load()
    visit.set("length", 4)
    visit.compare(PROMPT)
    page.wait_for_selector("#right .state:text-is('Stopped at the length limit'), #right .state:text-is('Done')")
    assert page.inner_text("#left .state") == "Not loaded" and "ran alone" in page.inner_text("#verdict")
    keep(page, request.node.name)
    with_facts(browser=section | {"most_bytes": min(pair) - 1})
    assert "Too large for this browser" in page.inner_text("#start") and page.is_disabled("#go")
    with_facts(schema_version=1)
    assert "schema version 1; this page reads version 2" in page.inner_text("#notice")
    with_facts(pruned=facts["pruned"] | {"repo_id": "ada/gone"})
    page.evaluate("caches.delete('gradmap-models')")
    page.click("#load")
    page.wait_for_selector("#notice .error")
    assert "The pruned model could not be downloaded: it does not exist (404), or is private." in page.inner_text(
        "#notice"
    )
    assert "Download" in page.inner_text("#load")  # and again
    visit.context.close()
    assert [problem for problem in visit.problems if "404" not in problem] == []


@contextlib.contextmanager
def in_browser(folder: Path) -> Iterator[str]:
    """`gradmap-hub compare FOLDER --in browser`; yields its address."""
    command = [sys.executable, "-m", "gradmap_hub", "compare", str(folder), "--in", "browser", "-q"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip() + "/"
    finally:
        process.terminate()
        # uvicorn raises the signal again once it has stopped; `main` turns it into Ctrl-C's status.
        assert process.wait(20) in (0, 130)


@pytest.mark.slow
def test_the_local_twin(browser: Any, published: SimpleNamespace, tmp_path: Path) -> None:
    """The same page from the model folder and the Space folder; both models from this machine."""
    with in_browser(published.folder) as url:
        visit = Visit(browser, url)
        assert visit.page.evaluate("crossOriginIsolated")
        visit.load()
        visit.set("length", 12)
        visit.compare(PROMPT)
        visit.wait_until_finished()
        original = original_folder(published, tmp_path)
        assert visit.answers() == [expected(folder, PROMPT, 12) for folder in (original, published.folder)]
        evil = visit.page.request.get(url, headers={"host": "evil.example"})
        assert evil.status == 400
        for path in ("gradmap.json", "../gradmap.json", "%2e%2e/small/gradmap.json", "pruned/model.safetensors"):
            assert visit.page.request.get(url + path).status == 404, path
        visit.close()


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_real_model_beside_its_original(
    browser: Any, libraries: Path, tmp_path_factory: pytest.TempPathFactory, width: int, scheme: str
) -> None:
    """The 135M model of the demo in the folder GRADMAP_DEMO, or a new one; its answers are those of `generate`. In int8
    they may differ: there, ONNX Runtime for Python also rounds the activations."""
    output = Path(os.environ.get("GRADMAP_DEMO") or tmp_path_factory.mktemp("demo") / "out")
    if not output.exists():
        subprocess.run([sys.executable, "-m", "gradmap_hub", "demo", "--output", output, "--quiet"], check=True)
    (folder,) = (path for path in output.glob("*-gradmap-*") if (path / "gradmap.json").is_file())
    with in_browser(folder) as url:
        visit = Visit(browser, url, width, scheme)
        page = visit.page
        paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        began = time.monotonic()
        visit.load(120)
        print(f"first paint {paint:.0f} ms, ready {time.monotonic() - began:.1f} s after the click:",
              page.inner_text("#banner"))  # fmt: skip
        visit.set("length", 24)
        visit.compare(PROMPT)
        visit.wait_until_finished(300)
        answers = visit.answers()
        print(
            answers, page.inner_text("#verdict"), page.inner_text("#left .figures"), page.inner_text("#right .figures")
        )
        assert "Paris" in answers[0]
        if "float32" in page.inner_text("#banner"):
            assert answers[1] == expected(folder, PROMPT, 24)
        keep(page, f"static-real-{width}-{scheme}")
        visit.set("length", 256)
        visit.compare("Write a long story about a lighthouse.")
        page.wait_for_selector("#left .state:text-is('Generating')", timeout=60_000)
        page.click("#stop")
        page.wait_for_selector("#left .state:text-is('Stopped')", timeout=60_000)
        page.evaluate("document.getElementById('settings').open = true")
        page.check("#blind")
        visit.set("length", 4)
        visit.compare("Name a colour.")
        page.wait_for_selector("#votes", state="visible", timeout=120_000)
        page.get_by_role("button", name="Tie").click()
        assert "You found them equal." in page.inner_text("#verdict")
        keep(page, f"static-real-{width}-{scheme}-vote")
        visit.close()


@pytest.mark.slow
@pytest.mark.xfail(
    reason="on an otherwise idle machine 1.17, 1.03 and 1.14 were measured; the cause is not known", strict=False
)
def test_two_copies_of_one_model_are_equally_fast(
    browser: Any, slow_model: Path, libraries: Path, tmp_path: Path
) -> None:
    same = SimpleNamespace(pruned=slow_model.parent / "checkpoint", pruned_onnx=slow_model, original_onnx=slow_model)
    with published_by("free", same, tmp_path, "float32") as published:
        visit = Visit(browser, published.url, 1280, "light", *published.hosts)
        visit.load()
        visit.set("length", 64)
        ratios = []
        for _ in range(3):
            visit.compare("Write a long story.")
            assert visit.wait_until_finished(300) == ["Stopped at the length limit"] * 2
            ratios.append(float(visit.page.inner_text("#verdict b").rstrip("\u00d7")))
        print("two copies of one model:", ratios)
        assert 0.93 <= sorted(ratios)[1] <= 1.07, ratios
        visit.close()
