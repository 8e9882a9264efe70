"""Text files to text: every format, what is no text, and what somebody damaged."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradmap_hub.data import texts
from gradmap_hub.data.rows import tokenize
from gradmap_hub.data.texts import check_text_files, is_local_text, read_text
from gradmap_hub.errors import CalibrationError


def test_three_formats_read_the_same_words(tmp_path: Path) -> None:
    parts = ["First part, with an umlaut: ä.", 'Second part, "quoted".', "Third."]
    (tmp_path / "a.txt").write_text("\n\n".join(parts), encoding="utf-8")
    lines = [json.dumps({"text": part, "id": 1}, ensure_ascii=False) for part in parts]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], "", *lines[1:], ""]), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": parts}), tmp_path / "a.parquet")
    read = [read_text(tmp_path / f"a.{kind}") for kind in ("txt", "jsonl", "parquet")]
    assert [text.name for text in read] == ["a.txt", "a.jsonl", "a.parquet"]
    assert read[0].content.split() == read[1].content.split() == read[2].content.split()
    assert read[0].sha256 == read[1].sha256  # of the words read, not of the file
    assert read_text(tmp_path / "a.txt", "owner/data").name == "owner/data"


def test_parquet_rows_that_end_their_own_line_gain_none(tmp_path: Path) -> None:
    values = ["= Title =\n", "", "A line.\n", None, "no end"]
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "w.parquet")
    assert read_text(tmp_path / "w.parquet").content == "= Title =\nA line.\nno end\n"


def test_jsonl_with_line_separators_inside_a_string(tmp_path: Path) -> None:
    """U+2028 and U+0085 are no line ends in JSON Lines; but json.dumps(ensure_ascii=False) writes them."""
    value = "one\u2028two\u0085three\u2029four"
    line = json.dumps({"text": value}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"{line}\r\n{line}\n", encoding="utf-8", newline="")
    assert read_text(tmp_path / "a.jsonl").content == f"{value}\n\n{value}"


def test_jsonl_with_half_a_surrogate_pair(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "cut \\ud83d off"}\n', encoding="utf-8")
    text = read_text(tmp_path / "a.jsonl")
    assert text.content.startswith("cut ") and text.content.endswith(" off")
    assert len(tokenize(text, tokenizer, 2).ids)  # what is read can be tokenised


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "Käse".encode("latin-1"), "not a UTF-8 text file"),
        ("latin.jsonl", '{"text": "Käse"}'.encode("latin-1"), "not a UTF-8 text file"),
        ("binary.txt", bytes(range(256)), "not a UTF-8 text file"),
        ("empty.txt", b"", "contains no text"),
        ("blank.txt", b" \n\t\n", "contains no text"),
        ("empty.jsonl", b"\n\n", "contains no text"),
        ("key.jsonl", b'{"text": "a"}\n{"content": "b"}\n', "line 2 is not a JSON object with the key `text`"),
        ("cut.jsonl", b'{"text": "a"}\n\n{"text": "b', "line 3 is not"),
        ("list.jsonl", b'["a"]\n', "line 1 is not"),
        ("garbage.parquet", b"PAR1 nothing else", "garbage.parquet"),
        ("empty.parquet", b"", "empty.parquet"),
    ],
)
def test_files_that_are_no_text(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_text(path)


def test_missing_file_folder_and_column(tmp_path: Path) -> None:
    for name in ("gone.txt", "gone.jsonl", "gone.parquet"):
        with pytest.raises(CalibrationError, match="No such text file"):
            read_text(tmp_path / name)
    with pytest.raises(CalibrationError, match="not a UTF-8 text file"):
        read_text(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(CalibrationError, match="column `text`"):
        read_text(tmp_path / "c.parquet")


PARTS = ["First part: ä.", "Second.\n\nStill the second.", "Third"]
READ = "\n\n".join(PARTS)


def rows(parts: list[Any]) -> list[str]:
    return [json.dumps({"text": part, "id": 1}) for part in parts]


def parquet(values: Any) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(values))), "text": values}), stream)
    return stream.getvalue()


BOM = b"\xef\xbb\xbf"
# Name and content of a file, and the text in it.
GOOD: dict[str, tuple[str, bytes, str]] = {
    "plain": ("a.txt", READ.encode(), READ),
    "upper case": ("A.JSONL", "\n".join(rows(PARTS)).encode(), READ),
    "no row": ("a.jsonl", "\n".join(rows([None, PARTS[0], None, *PARTS[1:], None])).encode(), READ),
    "a byte order mark": ("a.jsonl", BOM + "\n".join(rows(PARTS)).encode(), READ),
    "a byte order mark in a text": ("a.txt", BOM + READ.encode(), READ),
    "lines in .json": ("a.json", "\n".join(rows(PARTS)).encode(), READ),
    "a list": ("a.json", json.dumps([{"text": part} for part in PARTS]).encode(), READ),
    "a list with a mark": ("a.JSON", BOM + b"\n [" + ", ".join(rows([*PARTS, None])).encode() + b"] \n", READ),
    "a number as an unknown ending": ("notes.2024", READ.encode(), READ),
    "large strings": ("a.parquet", parquet(pyarrow.array(["a", "b"], pyarrow.large_string())), "a\nb\n"),
    "repeated strings": ("a.PARQUET", parquet(pyarrow.array(["a", None, "a"]).dictionary_encode()), "a\na\n"),
}


@pytest.mark.parametrize("name", GOOD)
def test_the_text_of_a_file(name: str, tmp_path: Path) -> None:
    file, content, wanted = GOOD[name]
    (tmp_path / file).write_bytes(content)
    assert read_text(tmp_path / file).content == wanted


def zipped(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", content)
    return stream.getvalue()


LINES = "\n".join(rows(PARTS)).encode()
# Name and content of a file, and what the error says.
BAD: dict[str, tuple[str, bytes, str]] = {
    "an object": ("a.jsonl", b'{"text": "a"}\n{"text": {"en": "b"}}', "`text` in line 2 is an object"),
    "a list as text": ("a.jsonl", b'{"text": ["a"]}', "`text` in line 1 is a list"),
    "a number": ("a.jsonl", b'\n{"text": 1}', "`text` in line 2 is a number"),
    "true": ("a.json", b'[{"text": "a"}, {"text": true}]', "`text` in entry 2 is true or false"),
    "a list without text": ("a.json", b'[{"text": "a"}, {"content": "b"}]', "entry 2 is not a JSON object"),
    "a list of texts": ("a.json", b'["a"]', "entry 1 is not a JSON object"),
    "half a list": ("a.json", b'[{"text": "a"},', "a.json: it is not a list of objects"),
    "an object over lines": ("a.json", b'{\n"text": "a"\n}', "line 1 is not a JSON object"),
    "deep": ("a.jsonl", b"[" * 20_000, "line 1 is not a JSON object"),
    "a deep list": ("a.json", b"[" * 20_000, "it is not a list of objects"),
    "only null": ("a.jsonl", b'{"text": null}\n', "contains no text"),
    "comma-separated": ("a.CSV", b"text\na\n", "is a table"),
    "tab-separated": ("a.tsv", b"text\tid\n", "is a table"),
    "gzip": ("a.jsonl", gzip.compress(LINES), "it is gzip"),
    "gzip as it is named": ("a.jsonl.gz", gzip.compress(LINES), "it is gzip"),
    "bzip2": ("a.txt", bz2.compress(LINES), "it is bzip2"),
    "xz": ("a.txt", lzma.compress(LINES), "it is xz"),
    "Zstandard": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x24\x01\x09\x00\x00a", "it is Zstandard"),
    "ZIP": ("a.txt", zipped(LINES), "it is ZIP"),
    "Parquet by another name": ("a.txt", parquet(PARTS), "it is Parquet"),
    "UTF-16": ("a.txt", READ.encode("utf-16"), "it is UTF-16"),
    "UTF-16 without a mark": ("a.txt", "plain words".encode("utf-16-le"), "the byte 0"),
    "numbers in a column": ("a.parquet", parquet([1, 2]), "the column `text` holds int64"),
    "bytes in a column": ("a.parquet", parquet([b"a"]), "the column `text` holds binary"),
    "lists in a column": ("a.parquet", parquet([["a"]]), "the column `text` holds list"),
    "a cut column": ("a.parquet", parquet(PARTS)[:-30], "a.parquet has no readable column"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_text_is_named(name: str, tmp_path: Path) -> None:
    file, content, said = BAD[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        read_text(tmp_path / file)
    assert said in caught.value.message and "\n" not in caught.value.message


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes")
    os.mkfifo(tmp_path / "a.txt")
    for check in (read_text, lambda path: check_text_files([str(path)])):
        with pytest.raises(CalibrationError):
            check(tmp_path / "a.txt")


def test_names_of_files_are_told_from_data_sets() -> None:
    assert all(map(is_local_text, ("a.txt", "a.JSONL", "dir/a.json", "./a", "~/a", "a.Parquet")))
    assert not any(map(is_local_text, ("owner/data", "owner/data:config/train")))


def test_no_more_is_read_than_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_CHARACTERS", 10)
    later = b"\xff no text"  # where it is not looked at
    files = {
        "a.txt": b"0123456789" + b"x" * 100_000 + later,
        "a.jsonl": b'{"text": "0123456789ab"}\n' + b'{"text": "b"}\n' * 10_000 + later,
        "a.parquet": parquet(["0123456789ab", "c"]),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert read_text(tmp_path / name).content == "0123456789"
    monkeypatch.setattr(texts, "_MOST_JSON", 20)
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"}, {"text": "b"}]')
    with pytest.raises(CalibrationError, match="too large for one JSON list"):
        read_text(tmp_path / "a.json")


VALID = [("a.txt", READ.encode()), ("a.jsonl", LINES), ("a.json", b"[" + LINES.replace(b"\n", b",") + b"]"),
         ("a.parquet", parquet(PARTS))]  # fmt: skip


def damaged(case: tuple[str, bytes], changes: list[tuple[int, bytes]], path: Path) -> None:
    """Read a valid file with bytes replaced: a text, or our error in one line."""
    name, content = case
    for place, by in changes:
        at = place % len(content)
        content = content[:at] + by + content[at + len(by) :]
    (path / name).write_bytes(content)
    try:
        text = read_text(path / name)
    except CalibrationError as error:
        assert "\n" not in error.message
    else:
        assert text.content.encode() and text.content.strip()


BYTES = [b"\0", b"\xff", b'"', b"\n", b"[", b"null", b"\\ud800", b"{", b"1"]
CHANGES = st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(BYTES)), min_size=1, max_size=4)
ALLOWED = [HealthCheck.function_scoped_fixture]


@settings(max_examples=50, deadline=None, suppress_health_check=ALLOWED)
@given(st.sampled_from(VALID), CHANGES)
def test_damaged_files_are_text_or_refused(tmp_path: Path, case: tuple[str, bytes], changes: list[Any]) -> None:
    damaged(case, changes, tmp_path)


@pytest.mark.slow
@settings(max_examples=5_000, deadline=None, suppress_health_check=ALLOWED)
@given(st.sampled_from(VALID), CHANGES)
def test_thousands_of_damaged_files(tmp_path: Path, case: tuple[str, bytes], changes: list[Any]) -> None:
    damaged(case, changes, tmp_path)
