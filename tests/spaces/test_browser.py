"""The page as a visitor meets it: headless Chromium on a Space with the tiny pair, and with the real one (slow)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Kept for people to look at, one per test.
SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"
FINISHED = ("Done", "Stopped at the length limit")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Visit:
    """One page, with everything that went wrong in its console and every other host it asked."""

    def __init__(self, browser: Any, url: str, width: int, scheme: str) -> None:
        # Without motion: halfway through a fade, colours have contrasts that nobody reads.
        self.context = browser.new_context(
            viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self._request(request.url, url))
        self.page.goto(url)
        self.page.wait_for_selector("#go:not([disabled])", timeout=30_000)

    def _console(self, message: Any) -> None:
        # Gradio drops its event stream when a run ends; Chromium reports that as an aborted request.
        if message.type in ("error", "warning") and "ERR_ABORTED" not in message.text:
            self.problems.append(message.text)

    def _request(self, address: str, url: str) -> None:
        if not address.startswith((url, "data:", "blob:")):
            self.problems.append(f"asked another host: {address}")

    def compare(self, prompt: str) -> None:
        self.page.fill("#prompt textarea", prompt)
        self.go()

    def go(self) -> None:
        # What the cards say now is of the run before; a page may see no more of the next one than its end.
        self.page.evaluate("document.querySelectorAll('.state').forEach(state => { state.dataset.before = '' })")
        self.page.click("#go")

    def wait_until_finished(self) -> list[str]:
        ended = ", ".join(f":text-is('{words}')" for words in FINISHED)
        for side in ("left", "right"):
            self.page.wait_for_selector(f"#{side} .state:not([data-before]):is({ended})", timeout=30_000)
        self.page.wait_for_selector("#go", state="visible")
        return [self.page.inner_text(f"#{side} .state") for side in ("left", "right")]

    def wait_for_state(self, state: str) -> None:
        """The page hears of it a moment after the server knows."""
        self.page.wait_for_selector(f"#left .state:text-is('{state}')")

    def open_settings(self) -> None:
        self.page.get_by_role("button", name="Settings").first.click()

    def set_length(self, tokens: int) -> None:
        field = self.page.get_by_label("number input for Maximum tokens per answer")
        if not field.is_visible():
            self.open_settings()
        field.fill(str(tokens))
        field.press("Tab")


@pytest.fixture(scope="module")
def real_app(kit: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`gradmap-hub compare` of the 135M model and its original, of the demo in the folder GRADMAP_DEMO or a new one."""
    output = Path(os.environ.get("GRADMAP_DEMO") or tmp_path_factory.mktemp("demo") / "out")
    program = [sys.executable, "-m", "gradmap_hub"]
    if not output.exists():
        subprocess.run([*program, "demo", "--output", output, "--quiet"], check=True)
    (pruned,) = (path for path in output.glob("*-gradmap-*") if (path / "gradmap.json").is_file())
    log = tmp_path_factory.mktemp("compare") / "log.txt"
    with log.open("wb") as errors:
        process = subprocess.Popen([*program, "compare", pruned, "-q"], stdout=subprocess.PIPE, stderr=errors)
    assert process.stdout is not None
    app = kit.App(process.stdout.readline().decode().strip(), process, log)
    assert app.wait_until(lambda health: health["state"] != "loading")["state"] == "ready"
    yield app
    assert kit.stop_app(app) == 0


@pytest.fixture
def visit(browser: Any, running: Any, request: pytest.FixtureRequest) -> Iterator[Visit]:
    width, scheme = getattr(request, "param", (1280, "light"))
    visit = Visit(browser, running.url, width, scheme)
    yield visit
    keep(visit.page, request.node.name)
    visit.context.close()
    assert visit.problems == []


def keep(page: Any, name: str) -> None:
    """The whole page as the test left it."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.png", full_page=True)


@pytest.mark.parametrize("visit", [(1280, "light"), pytest.param((390, "dark"), marks=pytest.mark.slow)], indirect=True)
def test_both_cards_finish(visit: Visit) -> None:
    visit.compare("What is the capital of France?")
    states = visit.wait_until_finished()
    assert all(state in FINISHED for state in states), states
    assert "This run" in visit.page.inner_text("#verdict")
    assert visit.page.evaluate("document.documentElement.scrollWidth === window.innerWidth")
    left, right = (visit.page.locator(f"#{side} .card").bounding_box() for side in ("left", "right"))
    if visit.page.viewport_size["width"] == 390:
        assert right["y"] >= left["y"] + left["height"]
    else:
        assert (left["y"], left["height"]) == (right["y"], right["height"])
        assert right["x"] >= left["x"] + left["width"]


def test_an_example_fills_the_prompt_and_the_keyboard_compares(visit: Visit) -> None:
    visit.page.get_by_role("button", name="Explain gravity.").click()
    visit.page.wait_for_function("document.querySelector('#prompt textarea').value === 'Explain gravity.'")
    visit.page.press("#prompt textarea", "Shift+Enter")
    assert all(state in FINISHED for state in visit.wait_until_finished())


def test_stop_stops(browser: Any, slow_app: Any, request: pytest.FixtureRequest) -> None:
    visit = Visit(browser, slow_app.url, 1280, "light")
    visit.set_length(256)
    visit.compare("Write a long story.")
    slow_app.wait_until(lambda health: health["running"] == 1)
    visit.page.click("#stop")
    visit.wait_for_state("Stopped")
    keep(visit.page, request.node.name)
    # And the next run works.
    visit.set_length(4)
    visit.compare("Write another.")
    assert visit.wait_until_finished() == ["Stopped at the length limit"] * 2
    visit.context.close()
    assert visit.problems == []


def test_wrong_prompts_are_said_on_the_page(visit: Visit) -> None:
    visit.compare("   ")
    visit.page.wait_for_selector("#notice .error")
    assert "Type a prompt first." in visit.page.inner_text("#notice")
    visit.compare("x" * 4001)
    visit.page.wait_for_function("document.querySelector('#notice').innerText.includes('4,001')")
    assert visit.page.is_visible("#go")


def test_a_blind_vote_hides_and_then_reveals(visit: Visit) -> None:
    visit.open_settings()
    visit.page.get_by_label("Blind vote").check()
    visit.compare("What is the capital of France?")
    visit.page.wait_for_selector("#votes", state="visible", timeout=30_000)
    headings = [visit.page.inner_text(f"#{side} h2") for side in ("left", "right")]
    assert headings == ["Model A", "Model B"]
    assert "tiny" not in visit.page.inner_html("#left") + visit.page.inner_html("#right")
    assert "tok/s" not in visit.page.inner_text("#left")
    visit.page.get_by_role("button", name="A is better").click()
    visit.page.wait_for_selector("#verdict .vote")
    chosen = visit.page.inner_text("#left .tag").lower()
    assert f"You preferred the {chosen}" in visit.page.inner_text("#verdict")
    assert {visit.page.inner_text(f"#{side} h2") for side in ("left", "right")} == {"tiny", "tiny-pruned"}


@pytest.mark.slow  # tests/spaces/test_app.py sets it without a browser
@pytest.mark.parametrize("visit", [(1280, "light"), (390, "light")], indirect=True)
def test_the_precision_is_a_setting_of_both(visit: Visit, running: Any) -> None:
    visit.open_settings()
    choices = visit.page.get_by_role("radio")
    assert choices.count() == 2 and visit.page.get_by_role("radio", name="int8").is_checked()
    visit.compare("What is the capital of France?")
    visit.wait_until_finished()
    assert "This run, int8" in visit.page.inner_text("#verdict")
    visit.page.get_by_role("radio", name="float32").check()
    visit.go()
    assert all(state in FINISHED for state in visit.wait_until_finished())
    assert "This run, float32" in visit.page.inner_text("#verdict")
    assert running.health()["precision"] == "float32"
    assert visit.page.inner_text("#banner").strip() == ""
    visit.page.get_by_role("button", name="How this is measured").click()
    visit.page.wait_for_selector("table >> text=+0.4%")
    assert visit.page.evaluate("document.documentElement.scrollWidth === window.innerWidth")
    keep(visit.page, f"settings and method, {visit.page.viewport_size['width']}")
    # The next visitor begins with int8 again.
    visit.page.reload()
    visit.page.wait_for_selector("#go:not([disabled])", timeout=30_000)
    visit.compare("What is the capital of France?")
    visit.wait_until_finished()
    assert "This run, int8" in visit.page.inner_text("#verdict")


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_said(
    browser: Any, kit: SimpleNamespace, pair: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The first precision lacks a file; with the other one the page works all the same."""
    folder = kit.deploy(tmp_path / "app", pair)
    (folder / "original" / "model_int8.onnx").unlink()
    app = kit.start_app(folder, PRUNED_MODEL=str(pair.pruned_onnx))
    try:
        app.wait_until(lambda health: health["state"] == "error")
        visit = Visit(browser, app.url, 1280, "light")
        assert "model_int8.onnx is missing" in visit.page.inner_text("#banner")
        visit.compare("Hello")
        visit.page.wait_for_selector("#notice .error")
        assert "The original model could not be loaded" in visit.page.inner_text("#notice")
        keep(visit.page, request.node.name)
        visit.open_settings()
        visit.page.get_by_role("radio", name="float32").check()
        visit.go()
        assert all(state in FINISHED for state in visit.wait_until_finished())
        assert visit.page.inner_text("#notice").strip() == visit.page.inner_text("#banner").strip() == ""
        visit.context.close()
        assert visit.problems == []
    finally:
        assert kit.stop_app(app) == 0


@pytest.mark.slow
def test_visitors_wait_their_turn_and_a_closed_page_frees_it(browser: Any, slow_app: Any) -> None:
    """The first one closes the page in the middle of a long answer; the second, who waited, is served at once."""
    first, second = (Visit(browser, slow_app.url, 1280, "light") for _ in range(2))
    for visit, length in ((first, 256), (second, 4)):
        visit.set_length(length)
    began = time.monotonic()
    first.compare("Write a long story.")
    assert first.wait_until_finished() == ["Stopped at the length limit"] * 2
    alone = time.monotonic() - began

    first.compare("Write a long story.")
    slow_app.wait_until(lambda health: health["running"] == 1)
    second.compare("Hello")
    slow_app.wait_until(lambda health: health["waiting"] == 1)
    second.wait_for_state("Waiting")
    began = time.monotonic()
    first.context.close()
    assert second.wait_until_finished() == ["Stopped at the length limit"] * 2
    assert time.monotonic() - began < alone / 2, alone
    slow_app.wait_until(lambda health: health["running"] == health["waiting"] == 0, 5)
    second.context.close()
    assert first.problems == second.problems == []


@pytest.mark.slow
def test_who_waits_can_stop_and_come_again(browser: Any, slow_app: Any) -> None:
    first, second = (Visit(browser, slow_app.url, 1280, "light") for _ in range(2))
    first.set_length(256)
    first.compare("Write a long story.")
    slow_app.wait_until(lambda health: health["running"] == 1)
    second.compare("Hello")
    slow_app.wait_until(lambda health: health["waiting"] == 1)
    second.page.evaluate("document.getElementById('stop').click()")  # at once, before its turn comes
    second.page.wait_for_selector("#go", state="visible")
    slow_app.wait_until(lambda health: health["waiting"] == 0)
    assert slow_app.health()["running"] == 1  # the first still has its turn
    second.wait_for_state("Stopped")
    first.page.click("#stop")
    second.set_length(4)
    second.compare("Hello")
    assert second.wait_until_finished() == ["Stopped at the length limit"] * 2
    for visit in (first, second):
        visit.context.close()
        assert visit.problems == []


def test_live_regions_and_names(visit: Visit) -> None:
    assert visit.page.get_by_role("textbox", name="Prompt").count() == 1
    assert visit.page.locator("#spoken [aria-live=polite]").count() == 1
    assert visit.page.locator("#notice [role=alert]").count() == 1
    assert visit.page.get_by_role("heading", level=1).inner_text() == "Tiny, one layer lighter"


@pytest.mark.parametrize(
    "visit",
    [
        (1280, "light"),
        *(pytest.param(look, marks=pytest.mark.slow) for look in ((1280, "dark"), (390, "light"))),
        (390, "dark"),
    ],
    indirect=True,
)
def test_axe_finds_nothing_serious(visit: Visit) -> None:
    """Before, and with two answers and the settings open."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    assert _serious(axe, visit.page) == []
    visit.page.get_by_role("button", name="Settings").first.click()
    visit.compare("What is the capital of France?")
    visit.wait_until_finished()
    assert _serious(axe, visit.page) == []


def _serious(axe: Any, page: Any) -> list[tuple[str, list[str]]]:
    """Findings of axe-core that are serious or critical: the rule, and where."""
    return [
        (finding["id"], [node["html"][:160] for node in finding["nodes"]])
        for finding in axe.run(page).response["violations"]
        if finding["impact"] in ("serious", "critical")
    ]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_the_real_model_beside_its_original(
    browser: Any, real_app: Any, width: int, scheme: str, request: pytest.FixtureRequest
) -> None:
    """Everything a visitor does, in one visit."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    visit = Visit(browser, real_app.url, width, scheme)
    page = visit.page
    visit.set_length(48)
    visit.compare("What is the capital of France?")
    assert all(state in FINISHED for state in visit.wait_until_finished())
    assert "Paris" in page.inner_text("#left") and "This run" in page.inner_text("#verdict")
    assert page.evaluate("document.documentElement.scrollWidth === window.innerWidth")
    keep(page, f"real-{width}-{scheme}")
    assert _serious(axe, page) == []

    page.get_by_role("button", name="List three uses").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value.startsWith('List three uses')")
    visit.set_length(256)
    visit.compare("Write a long story about a lighthouse.")
    real_app.wait_until(lambda health: health["running"] == 1)
    page.click("#stop")
    visit.wait_for_state("Stopped")

    visit.compare("   ")
    page.wait_for_selector("#notice .error")
    visit.set_length(16)
    page.get_by_label("Blind vote").check()
    visit.compare("Name a colour.")
    page.wait_for_selector("#votes", state="visible", timeout=30_000)
    assert {page.inner_text(f"#{side} h2") for side in ("left", "right")} == {"Model A", "Model B"}
    page.get_by_role("button", name="A is better").click()
    page.wait_for_selector("#verdict .vote")
    keep(page, f"real-{width}-{scheme}-vote")
    visit.context.close()
    assert visit.problems == []
