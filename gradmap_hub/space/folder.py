"""Rewrites a Space folder from one kind into another; compare.json and the original's exports are kept."""

from __future__ import annotations

from pathlib import Path

from gradmap_hub.comparison import raw_comparison
from gradmap_hub.progress import Reporter
from gradmap_hub.space.app import compare_text, remove_app, write_app
from gradmap_hub.space.browser import BrowserPage, is_browser, remove_page, write_page
from gradmap_hub.space.kinds import Kind
from gradmap_hub.space.vendor import fetch
from gradmap_hub.space.zerogpu import is_for_zero, set_hardware


def is_space(folder: Path) -> bool:
    """Whether a folder holds a Space of some kind."""
    return (folder / "app.py").is_file() or is_browser(folder)


def kind_of(folder: Path) -> Kind:
    """The kind of a Space folder."""
    return "browser" if is_browser(folder) else "zero" if is_for_zero(folder) else "gradio"


def set_kind(folder: Path, kind: Kind, page: BrowserPage | None = None, reporter: Reporter | None = None) -> None:
    """Rewrite a Space folder for a kind. A Gradio app that is of the kind already stays as it is.

    Args:
        folder: The Space folder.
        kind: The wanted kind.
        page: What a browser Space is made from; required for that kind.
        reporter: Receives the download of the page's libraries.

    Raises:
        BrowserRuntimeMissing: the libraries of the page cannot be fetched; the folder is unchanged.
        SpaceImpossible: no precision fits into a browser.
        SourceError: compare.json is missing or invalid.
    """
    if kind == "browser":
        assert page is not None
        libraries = fetch(reporter)
        write_page(folder, page, libraries)
        remove_app(folder)
        return
    if is_browser(folder):
        facts = raw_comparison(folder)
        facts.pop("browser", None)
        remove_page(folder)
        for entry in facts["precisions"]:
            entry["pruned"] |= {"stored": "hub", "path": "onnx"}
        compare_text(folder, facts)
        write_app(folder, facts)
    set_hardware(folder, zero=kind == "zero")
