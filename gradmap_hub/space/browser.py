"""Writes a browser Space: a static page, its libraries, and what it must know about the models.

Every Space folder has a compare.json; that of a browser Space has an additional section `browser`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradmap_hub.comparison import raw_comparison
from gradmap_hub.errors import SpaceImpossible
from gradmap_hub.formats import BROWSER_BYTES, graph_path, of_precision
from gradmap_hub.layout import sha256_of
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.space.app import compare_text, content_folder, install, render_readme
from gradmap_hub.space.plan import ORIGINAL_FOLDER
from gradmap_hub.space.vendor import LIBRARIES, PACKAGES, RUNTIMES, VENDOR

# The page's own files, in spaces/browser/; style.css is shared with the Gradio app.
PAGE = "browser"
INDEX = "index.html"
SHARED_STYLE = "style.css"
TOKENIZER = "tokenizer.json"
# Folder of the pruned model's files in a Space whose model is private: the page has no token to fetch them with.
PRUNED_FOLDER = "pruned"
# Headers that a static site needs for threads in WebAssembly; a Space sets them in its README.md.
HEADERS = {
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "cross-origin",
}
_VERSION_DIGITS = 16


@dataclass(frozen=True)
class PromptText:
    """How both models are prompted: the pruned one has the original's tokenizer.

    `special_tokens`: texts by name, such as bos_token; `end_ids`: the token ids that end an answer; `context_length`:
    None if the configuration does not state it.
    """

    chat_template: str | None
    special_tokens: Mapping[str, str]
    end_ids: tuple[int, ...]
    context_length: int | None


@dataclass(frozen=True)
class BrowserPage:
    """What a browser Space is made from.

    Attributes:
        model_folder: The pruned model.
        text: How the models are prompted.
        hub: The Hub's address, for links and for models that are not stored in the Space.
        pairs: Bytes of both models' files by precision; only precisions that fit into a browser.
    """

    model_folder: Path
    text: PromptText
    hub: str
    pairs: Mapping[str, BeforeAfter]


def page_files() -> list[Path]:
    """The installed files of the page."""
    own = [path for path in sorted((content_folder() / PAGE).iterdir()) if path.suffix in (".html", ".js", ".css")]
    return [*own, content_folder() / SHARED_STYLE]


def is_browser(space: Path) -> bool:
    """Whether a Space folder holds the page instead of the Gradio app."""
    return (space / INDEX).is_file()


def write_page(space: Path, page: BrowserPage, libraries: Path) -> None:
    """Write page, libraries, README.md and the section `browser` into a Space folder, and remove precisions that do not
    fit into a browser.

    Args:
        space: The Space folder.
        page: What the page is made from.
        libraries: The folder of the libraries, see `vendor.fetch`.

    Raises:
        SourceError: compare.json is missing or invalid.
        SpaceImpossible: no precision fits.
    """
    facts = browser_facts(space, page)
    (space / VENDOR).mkdir(exist_ok=True)
    for name in LIBRARIES:
        install(libraries / name, space / VENDOR / name)
    for path in page_files():
        install(path, space / path.name)
    install(page.model_folder / TOKENIZER, space / TOKENIZER)
    stored = {entry["file"] for entry in facts["precisions"] if entry["original"]["stored"] == "space"}
    for graph in (space / ORIGINAL_FOLDER).glob("*.onnx*"):
        if graph.name.partition("_data")[0] not in stored:
            graph.unlink()
    if not stored:
        shutil.rmtree(space / ORIGINAL_FOLDER, ignore_errors=True)
    compare_text(space, facts)
    render_readme(space, facts, f"{PAGE}/README.md.jinja", packages=PACKAGES)


def remove_page(space: Path) -> None:
    """Remove what `write_page` wrote, except compare.json and README.md."""
    for path in page_files():
        if path.name != SHARED_STYLE:
            (space / path.name).unlink(missing_ok=True)
    (space / TOKENIZER).unlink(missing_ok=True)
    for folder in (VENDOR, PRUNED_FOLDER):
        shutil.rmtree(space / folder, ignore_errors=True)


def browser_facts(space: Path, page: BrowserPage) -> dict[str, Any]:
    """The content of compare.json for the page.

    Raises:
        SourceError: compare.json is missing or invalid.
        SpaceImpossible: no precision fits.
    """
    facts = raw_comparison(space)
    kept = []
    for entry in facts["precisions"]:
        pair = page.pairs.get(entry["name"])
        if pair is not None:
            sides = {"original": pair.before, "pruned": pair.after}
            changes = {side: _place(space, entry, side, bytes_, page) for side, bytes_ in sides.items()}
            kept.append({**entry, **changes})
    if not kept:
        raise SpaceImpossible("In no precision do both models fit into a browser.")
    tokenizer = page.model_folder / TOKENIZER
    section = {
        "hub": page.hub,
        "most_bytes": BROWSER_BYTES,
        "tokenizer": {"path": TOKENIZER, "bytes": tokenizer.stat().st_size, "version": _version(tokenizer)},
        "text": {
            "chat_template": page.text.chat_template,
            "special_tokens": dict(page.text.special_tokens),
            "end_ids": list(page.text.end_ids),
        },
        "context_length": page.text.context_length,
        "runtime": {
            backend: {
                "path": f"{VENDOR}/{library.name}",
                "bytes": library.bytes,
                "version": library.sha256[:_VERSION_DIGITS],
            }
            for backend, library in RUNTIMES.items()
        },
    }
    return {**facts, "precision": kept[0]["name"], "precisions": kept, "browser": section}


def _place(space: Path, entry: Mapping[str, Any], side: str, planned: int, page: BrowserPage) -> dict[str, Any]:
    """Where a model's file is, with its size, and a version under which the browser caches it."""
    place = entry[side]
    file = space / place["path"] / entry["file"]
    if side == "pruned":
        file = page.model_folder / graph_path(of_precision(entry["name"]))
    version = _version(file) if file.is_file() else ""
    return {**place, "bytes": place["bytes"] or planned, "version": version}


def _version(file: Path) -> str:
    return sha256_of(file)[:_VERSION_DIGITS]


def place_pruned(space: Path, model_folder: Path, *, stored: bool, commit: str | None) -> None:
    """Store the pruned model's files in a browser Space, or let the page fetch them from the model's repository.

    Args:
        space: The Space folder.
        model_folder: The folder of the pruned model.
        stored: Whether to store them; a page cannot fetch from a private repository.
        commit: The model's commit on the Hub.
    """
    facts = raw_comparison(space)
    shutil.rmtree(space / PRUNED_FOLDER, ignore_errors=True)
    for entry in facts["precisions"]:
        entry["pruned"] |= {"stored": "space", "path": PRUNED_FOLDER} if stored else {"stored": "hub", "path": "onnx"}
        if stored:
            (space / PRUNED_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(
                model_folder / graph_path(of_precision(entry["name"])), space / PRUNED_FOLDER / entry["file"]
            )
    facts["pruned"] |= {"revision": commit}
    compare_text(space, facts)
