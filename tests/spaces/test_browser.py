"""The page as a visitor meets it: headless Chromium on a Space with the tiny pair."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
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
        self.page.click("#go")

    def wait_until_finished(self) -> list[str]:
        self.page.wait_for_selector("#stop", state="visible")
        self.page.wait_for_selector("#go", state="visible", timeout=30_000)
        return [self.page.inner_text(f"#{side} .state") for side in ("left", "right")]

    def set_length(self, tokens: int) -> None:
        self.page.get_by_role("button", name="Settings").first.click()
        field = self.page.get_by_label("number input for Most tokens per answer")
        field.fill(str(tokens))
        field.press("Tab")


@pytest.fixture
def visit(browser: Any, running: Any, request: pytest.FixtureRequest) -> Iterator[Visit]:
    width, scheme = getattr(request, "param", (1280, "light"))
    visit = Visit(browser, running.url, width, scheme)
    yield visit
    visit.context.close()
    assert visit.problems == []


@pytest.mark.parametrize("visit", [(1280, "light"), (390, "dark")], indirect=True)
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


def test_stop_stops(visit: Visit) -> None:
    # The tiny models write hundreds of tokens in a second, so the stop is asked for at once.
    visit.set_length(256)
    visit.compare("Write a long story.")
    visit.page.wait_for_selector("#stop", state="visible")
    visit.page.evaluate("document.getElementById('stop').click()")
    visit.page.wait_for_selector("#go", state="visible", timeout=10_000)
    assert visit.page.inner_text("#left .state") == "Stopped"
    # And the next run works.
    visit.compare("Write another.")
    assert all(state in FINISHED for state in visit.wait_until_finished())


def test_wrong_prompts_are_said_on_the_page(visit: Visit) -> None:
    visit.compare("   ")
    visit.page.wait_for_selector("#notice .error")
    assert "Type a prompt first." in visit.page.inner_text("#notice")
    visit.compare("x" * 4001)
    visit.page.wait_for_function("document.querySelector('#notice').innerText.includes('4,001')")
    assert visit.page.is_visible("#go")


def test_a_blind_vote_hides_and_then_reveals(visit: Visit) -> None:
    visit.page.get_by_role("button", name="Settings").first.click()
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


def test_live_regions_and_names(visit: Visit) -> None:
    assert visit.page.get_by_role("textbox", name="Prompt").count() == 1
    assert visit.page.locator("#spoken [aria-live=polite]").count() == 1
    assert visit.page.locator("#notice [role=alert]").count() == 1
    assert visit.page.get_by_role("heading", level=1).inner_text() == "Tiny, one layer lighter"


@pytest.mark.parametrize("visit", [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")], indirect=True)
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
