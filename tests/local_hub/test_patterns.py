"""Patterns of .gitattributes and .gitignore: as git matches them, in a time that no pattern extends."""

import time

import pytest
from hypothesis import given, settings, strategies

from gradmap_hub.local_hub.errors import HubError
from gradmap_hub.local_hub.patterns import is_ignored, is_lfs_tracked, track


@pytest.mark.parametrize(
    ("pattern", "matched", "others"),
    [
        ("*.bin", ["a.bin", "x/y/a.bin", ".bin"], ["a.bin2", "a.bin/x"]),
        ("a*b*c", ["abc", "axbxc", "abcbc", "abbcc"], ["ab", "acb", "abcx"]),
        ("/a.bin", ["a.bin"], ["x/a.bin"]),
        ("x/*.bin", ["x/a.bin"], ["x/y/a.bin", "z/x/a.bin"]),
        ("saved_model/**/*", ["saved_model/a", "saved_model/x/y/a"], ["saved_model", "other/a"]),
        ("**/a", ["a", "x/a", "x/y/a"], ["xa", "a/b"]),
        ("**/**/a", ["a", "x/a", "x/y/a"], ["xa"]),
        ("x/**", ["x/a", "x/y/a", "x//"], ["x", "x/", "xa"]),
        ("x/**/y/**/z", ["x/y/z", "x/a/y/b/c/z", "x/y/y/z/z"], ["x/z", "xy/z", "x/y/az"]),
        ("a**/b", ["a/b", "axx/b"], ["a/x/b", "b"]),
        ("?a", ["xa", "é" + "a"], ["a", "xxa", "/a"]),
        ("[a-c]x", ["ax", "cx"], ["dx", "x"]),
        ("[!a-c]x", ["dx"], ["ax", "/x"]),
        ("[]a]", ["]", "a"], ["b"]),
        ("a[[:space:]]b", ["a b"], ["ab", "a_b"]),
        (r"\*\?\[", ["*?["], ["abc"]),
        ("[z-a]", [], ["z", "a", "[z-a]"]),
        ("[", ["["], ["a"]),
        ("a&&[&&~~||b]", ["a&&&", "a&&b"], ["a&&a"]),
    ],
)  # fmt: skip
def test_matching(pattern: str, matched: list[str], others: list[str]) -> None:
    attributes = f"{pattern} filter=lfs\n"
    assert [path for path in (*matched, *others) if is_lfs_tracked(attributes, path)] == matched


@pytest.mark.parametrize(
    "pattern",
    ["a*" * 128 + "b", "*a" * 128, "**/*a*" * 60 + "b", "**/" * 500 + "b", "a?*" * 100 + "b", "[a]*" * 60 + "b",
     "x/**/y" * 40, "[[:" * 1300, "[[:" * 1300 + "]", "a*" * 2000 + "b", "[ab]?" * 800,
     "".join(f"[{chr(n)}]" for n in range(200, 1500))],
)  # fmt: skip
def test_no_pattern_takes_long(pattern: str) -> None:
    """Of a regular expression the first of these takes longer than the age of the universe."""
    began = time.process_time()
    for path in ("a" * 255, "/".join(["a" * 200] * 20), "/".join("a" * 1000)):
        assert not is_ignored(pattern, path) or pattern.startswith("*a")
        is_lfs_tracked(f"{pattern} filter=lfs", path)
    assert time.process_time() - began < 5


def test_the_last_line_decides() -> None:
    assert is_lfs_tracked("*.bin -filter\n*.bin filter=lfs", "a.bin")
    assert not is_lfs_tracked("*.bin filter=lfs\na.* -filter\n# b filter=lfs", "a.bin")
    assert is_ignored("*.log\n!keep.log\n", "x.log") and not is_ignored("*.log\n!keep.log\n", "keep.log")
    assert is_ignored("build/\n!build/keep", "build/keep") and not is_ignored("build/", "build")


@pytest.mark.parametrize("text", ["a\n" * 1001, "x" * 5000])
def test_too_many_or_too_long_patterns_are_refused(text: str) -> None:
    with pytest.raises(HubError, match=r"\.gitignore has "):
        is_ignored(text, "a")


@pytest.mark.parametrize("examples", [50, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_path_that_is_tracked_by_name_is_matched(examples: int) -> None:
    name = strategies.text(strategies.sampled_from("ab*?[]\\ #!.-^\u2028\x85"), min_size=1, max_size=6)

    @settings(max_examples=examples, deadline=None, database=None)
    @given(strategies.lists(name, min_size=1, max_size=3))
    def check(parts: list[str]) -> None:
        path = "/".join(parts)
        assert is_lfs_tracked(track("", [path]), path)

    check()
