"""compare.json of a Space folder, which anybody may have edited: the error names the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.comparison import COMPARE, parse_comparison, read_comparison
from gradmap_hub.errors import SourceError
from gradmap_hub.hub.target import model_mark, space_mark
from gradmap_hub.pipeline.space import remove_space

FACTS: dict[str, Any] = {
    "runtime": "onnx",
    "original": {"name": "acme/tiny", "repo_id": "acme/tiny", "revision": "c" * 40},
    "pruned": {"name": "ada/small", "repo_id": "ada/small", "revision": None},
    "precisions": [{"name": "int8", "file": "model.onnx", "original": {"stored": "space"}}],
}


def test_what_it_tells(tmp_path: Path) -> None:
    (tmp_path / COMPARE).write_text(json.dumps(FACTS | {"title": "more"}), encoding="utf-8")
    facts = read_comparison(tmp_path)
    assert (facts.original.repo_id, facts.pruned.repo_id, facts.runtime) == ("acme/tiny", "ada/small", "onnx")
    assert facts.precisions[0].original.stored == "space"
    assert space_mark("acme/tiny", "ada/small").fits(json.dumps(FACTS).encode())
    assert not space_mark("acme/tiny", "ada/other").fits(json.dumps(FACTS).encode())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "it is missing"),
        ("[" * 10_000, "nested too deeply"),
        ("{", "Expecting property name"),
        ("[]", "its content is a list of length 0; an object is expected"),
        ("{}", "original is missing; an object is expected"),
        (FACTS | {"original": "acme/tiny"}, "original is 'acme/tiny'; an object is expected"),
        (FACTS | {"pruned": {"name": "a", "repo_id": 7}}, r"pruned.repo_id is 7; a string is expected"),
        (FACTS | {"precisions": [{"name": "int8"}]}, r"precisions\[0\].original is missing"),
        (FACTS | {"precisions": 3}, "precisions is 3; a list is expected"),
        (FACTS | {"runtime": ["onnx"]}, "runtime is a list of length 1; a string is expected"),
    ],
)
def test_what_is_refused(content: Any, words: str, tmp_path: Path) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    if content is not None:
        (tmp_path / COMPARE).write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match=words) as caught:
        read_comparison(tmp_path)
    assert COMPARE in caught.value.message and "gradmap-hub space" in (caught.value.hint or "")
    # In a repository, or a folder of an earlier run: that of somebody else.
    record: Any = None
    assert parse_comparison(text.encode()) is None and not remove_space(tmp_path, record)
    assert not space_mark("a", "b").fits(text.encode()) and not model_mark("a", "b").fits(text.encode())
