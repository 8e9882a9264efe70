"""The pages of the documentation site: `python docs/make_site.py FOLDER`.

The documentation is written to be read in the repository. The site is made of the same files, with the README as its
start page, links between them adjusted, and a reference of the commands from Typer. Pages are checked for links and
anchors that lead nowhere.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
# Files at the root that become pages.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def main(target: Path) -> None:
    pages = target / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir(parents=True)
    for name in ("images", "schemas"):
        shutil.copytree(DOCS / name, pages / name)
    shutil.copyfile(DOCS / "site.toml", target / "zensical.toml")
    for name in ("site.css", "site.js"):
        shutil.copyfile(DOCS / name, pages / name)
    for path in sorted(DOCS.glob("*.md")):
        (pages / path.name).write_text(adjusted(path), encoding="utf-8")
    for name, page in PAGES.items():
        (pages / page).write_text(adjusted(ROOT / name), encoding="utf-8")
    (pages / "cli.md").write_text(commands(), encoding="utf-8")
    broken = list(broken_links(pages))
    if broken:
        sys.exit("\n".join(broken))


def adjusted(path: Path) -> str:
    """A page with its links as they are on the site. Links to files that are no pages become their text."""

    def moved(match: re.Match[str]) -> str:
        image, text, link = match.groups()
        file, sign, anchor = link.partition("#")
        if not file or "://" in link or link.startswith("mailto:"):
            return match[0]
        place = (path.parent / unquote(file)).resolve().relative_to(ROOT).as_posix()
        if place.startswith("docs/") and (ROOT / place).is_file():
            return f"{image}[{text}]({place.removeprefix('docs/')}{sign}{anchor})"
        if place in PAGES:
            return f"{image}[{text}]({PAGES[place]}{sign}{anchor})"
        return text

    return outside_code(path.read_text(encoding="utf-8"), lambda text: _LINK.sub(moved, text))


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """`change` on all parts of a page that are not fenced code."""
    done: list[str] = []
    at = 0
    for fence in _FENCE.finditer(text):
        done += [change(text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*done, change(text[at:])])


def commands() -> str:
    """Every command with its arguments and options."""
    import typer
    from typer.cli import get_docs_for_click

    from gradmap_hub.cli.app import app

    group = typer.main.get_command(app)
    text = get_docs_for_click(obj=group, ctx=typer.Context(group), name="gradmap-hub")
    # Rich markup of the help texts.
    return re.sub(r"\\\[", "[", text).replace("# `gradmap-hub`", "# Commands", 1)


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as Python-Markdown makes them."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\s-]", "", plain.encode("ascii", "ignore").decode()).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", slug))
    return found


def broken_links(pages: Path) -> Iterator[str]:
    """Links of the pages to files and headings that do not exist."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in pages.glob("*.md")}
    for name, text in texts.items():
        for _, _, link in _LINK.findall(_FENCE.sub("", text)):
            file, _, anchor = link.partition("#")
            if "://" in link or link.startswith("mailto:"):
                continue
            target = unquote(file) or name
            if not (pages / target).is_file():
                yield f"{name}: {link} does not exist"
            elif anchor and target in texts and anchor not in anchors(texts[target]):
                yield f"{name}: {link} has no such heading"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
