"""Make the images of the README from a finished demo: `python docs/make_images.py build/demo`.

Renders the card as HTML, starts the comparison app on the demo's Space folder, submits a prompt, and takes screenshots
with headless Chromium (Debian's `chromium`). Needs the extras `space` and `dev`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from markdown_it import MarkdownIt
from playwright.sync_api import sync_playwright

from gradmap_hub.space.local import running_space

IMAGES = Path(__file__).parent / "images"
STYLE = """body{font:16px/1.5 system-ui,sans-serif;color:#1f2328;max-width:920px;margin:24px auto;padding:0 24px}
h1,h2{border-bottom:1px solid #d1d9e0;padding-bottom:.3em}table{border-collapse:collapse;margin:16px 0}
th,td{border:1px solid #d1d9e0;padding:6px 13px}tr:nth-child(2n){background:#f6f8fa}img{max-width:100%}
code{background:#eff1f3;padding:.2em .4em;border-radius:6px;font-size:85%}pre code{display:block;padding:16px}"""
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def main(demo: Path) -> None:
    folder = next(path for path in sorted(demo.glob("*-gradmap-*")) if (path / "gradmap.json").is_file())
    space = folder.with_name(folder.name + "-space")
    IMAGES.mkdir(exist_ok=True)
    shutil.copyfile(folder / "assets" / "layers.png", IMAGES / "layers.png")
    page_file = demo / "card.html"
    text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    base = f'<base href="{folder.resolve().as_uri()}/">'
    page_file.write_text(f"<!doctype html><meta charset=utf-8>{base}<style>{STYLE}</style>{html}", encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1000, "height": 1250})
        page.goto(page_file.resolve().as_uri())
        page.screenshot(path=IMAGES / "card.png")
        with running_space(space, {"PRUNED_MODEL": str(folder.resolve())}) as (url, _):
            page = browser.new_page(viewport={"width": 1280, "height": 880})
            page.goto(url)
            page.get_by_label("Prompt").first.fill("Explain gravity to a child in two sentences.")
            page.locator("#go:not([disabled])").click(timeout=120_000)  # the models load in the background
            page.get_by_text("This run").wait_for(timeout=180_000)
            page.wait_for_timeout(500)
            page.screenshot(path=IMAGES / "space.png")
        browser.close()
    page_file.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
